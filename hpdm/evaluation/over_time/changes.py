"""How much each frame of a video differs from the one before, measured as the frames come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

FROZEN = 0.5
"""A frame that differs less from the one before, in levels of 255 in the mean over pixels and channels, is frozen."""


@dataclass
class FrameChanges:
    """The changes from frame to frame. Entry ``t`` of a list is about frame ``t``; that of frame 0 is NaN."""

    levels: list[float] = field(default_factory=list)
    """Mean absolute differences from the frame before, in levels of 255."""
    energy: list[float] = field(default_factory=list)
    """Mean squared differences."""
    _last: np.ndarray | None = None

    def add(self, frames: np.ndarray) -> None:
        """Appends frames, uint8 ``[n, H, W, 3]``."""
        for frame in frames.astype(np.float64):
            change = np.full(1, np.nan) if self._last is None else frame - self._last
            self.levels.append(float(np.abs(change).mean()))
            self.energy.append(float((change**2).mean()))
            self._last = frame

    def frozen(self, frames: range, steps: np.ndarray) -> float:
        """The share of frozen ones among some frames, without those of which real clips repeat the frame before.

        Args:
            frames: numbers of frames.
            steps: of all frames, their numbers in the rendered file.
        """
        moving = [t for t in frames if t > 0 and steps[t] != steps[t - 1]]
        return float(np.mean([self.levels[t] < FROZEN for t in moving])) if moving else float("nan")

    def seam(self, borders: Sequence[int]) -> float:
        """The mean energy of the changes to the frames ``borders`` over that of all others: 1 where they do not show.

        NaN where there is nothing to compare. See :func:`hpdm.patch.seams.seam_energy` for the borders of tiles.
        """
        at_borders = [self.energy[t] for t in borders if 0 < t < len(self.energy)]
        elsewhere = [self.energy[t] for t in sorted(set(range(1, len(self.energy))) - set(borders))]
        if not at_borders or not elsewhere:
            return float("nan")
        return float(np.mean(at_borders) / max(float(np.mean(elsewhere)), 1e-12))
