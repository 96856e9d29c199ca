"""Each window of level 0 knows the last frames of the one before: what all storylines have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hpdm.frames import Known
from hpdm.long_video import State
from hpdm.patch.sampler import Sampler
from hpdm.windows import Window, Windows


class Autoregressive:
    """Level 0 of B long videos, window by window. Others derive from it.

    Args:
        sampler: of single windows.
        windows: how they follow each other.
        seeds: one per video.
        conditions: labels, texts and masks of the videos.
    """

    def __init__(self, sampler: Sampler, windows: Windows, seeds: Sequence[int], conditions: Mapping[str, Any]) -> None:
        self.sampler, self.windows, self.seeds, self.conditions = sampler, windows, seeds, conditions

    def window(self, window: Window, known: Known | None) -> list[Tensor]:
        """Level 0 of the next window, ``[B, C, f, h, w]``; an empty list: it is sampled as the levels above are.

        Args:
            window: which one.
            known: the frames of level 0 that it knows; ``None`` for none.
        """
        return []

    def finished(self, window: Window, video: Tensor) -> None:
        """Takes note of level 0 of a window, ``[B, C, f, h, w]``."""

    def state(self) -> State:
        """What the storyline needs to go on, besides the last window."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`state` returned."""
