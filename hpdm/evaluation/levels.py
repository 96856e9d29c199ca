"""The sizes at which videos are measured: the parts of a sampler's result (the levels of a pyramid)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hpdm.checks import Triple
from hpdm.system import System
from hpdm.video import to_uint8


@dataclass(frozen=True)
class Level:
    """One part of what a run samples, and how real videos are brought to its size."""

    system: System
    config: Any
    """The model's."""
    number: int

    @property
    def size(self) -> Triple:
        """Frames, height and width of a video on this level."""
        return self.system.part_sizes(self.config)[self.number]

    @property
    def is_last(self) -> bool:
        """Whether this is the run's full resolution."""
        return self.number == len(self.system.part_sizes(self.config)) - 1

    def covered(self, frames: int) -> int:
        """Frames at full resolution that the first ``frames`` frames of this level stand for."""
        return frames * self.config.resolution[0] // self.size[0]

    def average(self, values: np.ndarray) -> np.ndarray:
        """Means over the frames of each frame of this level: ``[F, ...]`` of full resolution to ``[f, ...]``."""
        group = self.config.resolution[0] // self.size[0]
        return values.reshape(len(values) // group, group, *values.shape[1:]).mean(axis=1)

    def real(self, videos: Tensor) -> Tensor:
        """Real videos at this size, as a sampler gives them.

        Args:
            videos: uint8 ``[B, C, F, H, W]`` at the run's resolution, of all or the first frames.

        Returns:
            ``[B, C, f, h, w]`` float32 in [-1, 1].
        """
        return self.system.real_part(self.config, videos, self.number)

    def real_pixels(self, video: Tensor) -> Tensor:
        """:meth:`real` of one video ``[C, F, H, W]`` as uint8 ``[C, f, h, w]``: what a sampled video is measured as."""
        return to_uint8(self.real(video[None])[0])


def levels_of(system: System, config: Any, numbers: Sequence[int] = ()) -> list[Level]:
    """The levels ``numbers`` of a model, or its last one alone if there are none.

    Raises:
        ValueError: a level that the model does not have.
    """
    count = len(system.part_sizes(config))
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"level: got {number}, expected 0 to {count - 1}, the levels of the run")
    return [Level(system, config, number) for number in numbers or (count - 1,)]
