"""Several overlapping windows of level 0 are sampled together.

At every step each window is predicted, and the predictions are averaged where windows overlap: Gen-L-Video (Wang et al.
2023), which is what tiles do in space. The windows share their noise: frames that follow the first window have that of
frames before, in another order (FreeNoise, Qiu et al. 2024). The next group knows the last frames of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpdm.frames import Known
from hpdm.long_video import State
from hpdm.patch.sampler import Sampler
from hpdm.patch.storyline import Autoregressive
from hpdm.patch.tiling import Tiling
from hpdm.windows import Window, Windows


class Joint(Autoregressive):
    """Groups of windows; see :class:`hpdm.patch.storyline.Autoregressive`.

    Args:
        together: windows of a group.
    """

    def __init__(
        self, sampler: Sampler, windows: Windows, seeds: Sequence[int], conditions: Mapping[str, Any], together: int
    ) -> None:
        super().__init__(sampler, windows, seeds, conditions)
        self.together, self.group = together, GroupSampler(sampler, windows, together)
        self._frames: Tensor | None = None  # [B, C, F, h, w] of the group that is being used

    def window(self, window: Window, known: Known | None) -> list[Tensor]:
        place = window.number % self.together
        if place == 0 or self._frames is None:
            given = [] if known is None else [_longer(known, self.group.tilings[0].size[0])]
            (self._frames,) = self.group(self.seeds, **self.conditions, known=given, window=window.number)
        start = place * self.windows.stride
        return [self._frames[:, :, start : start + self.windows.window]]

    def state(self) -> State:
        return {} if self._frames is None else {"group": self._frames}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._frames = state.get("group")


class GroupSampler(Sampler):
    """Samples level 0 of several windows together: windows are its tiles, along time.

    Args:
        sampler: of single windows.
        windows: how they follow each other.
        together: their number.
    """

    def __init__(self, sampler: Sampler, windows: Windows, together: int) -> None:
        super().__init__(sampler.model, sampler.options)
        (_, height, width), self.windows = self.config.patch, windows
        frames = windows.window + (together - 1) * windows.stride
        self.tilings = [WindowTiling(self.config.patch, (frames, height, width), (windows.stride, height, width))]

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Noise of which the frames after the first window are those one window earlier, shuffled stride by stride.

        So every window has all frames of the first one's noise once.
        """
        (channels, frames, *size), window = shape, self.windows.window
        noise = torch.randn(channels, window, *size, generator=generator)
        while noise.shape[1] < frames:
            order = torch.randperm(self.windows.stride, generator=generator)
            earlier = noise[:, noise.shape[1] - window :][:, : self.windows.stride]
            noise = torch.cat((noise, earlier[:, order]), dim=1)
        return noise[:, :frames]


@dataclass(frozen=True)
class WindowTiling(Tiling):
    """Windows of level 0, each of which is a whole video to the network."""

    @property
    def boxes(self) -> Tensor:
        """The box of the whole video, for every window: ``[T, 6]`` float32."""
        return torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]).repeat(self.tiles, 1)


def _longer(known: Known, frames: int) -> Known:
    """The known first frames of a window, as those of a group of so many frames."""
    count = int(known.frames.sum())
    return Known.ends(known.video[:, :, :count], None, (frames, *known.video.shape[3:]))
