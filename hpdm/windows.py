"""Windows: how a long video is covered by clips of the length that a model was trained on.

Lengths are in frames of the lowest part of a video (level 0 of a pyramid, the latents of an autoencoder), of which
each stands for ``scale`` frames of the video. A window overlaps the one before by the frames that it knows of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Window(NamedTuple):
    """One window of a long video; frames of the lowest part."""

    number: int
    start: int
    """Its first frame."""
    known: int
    """Its first so many frames are those of the windows before."""


@dataclass(frozen=True)
class Windows:
    """Windows of one length, each of which knows the last frames of the one before.

    Raises:
        ValueError: nothing known, or nothing left to sample.
    """

    window: int
    """Frames of a window."""
    known: int
    """Frames that a window knows of the one before, k."""
    scale: int = 1
    """Frames of the video per frame of a window."""

    def __post_init__(self) -> None:
        if not 1 <= self.known < self.window:
            raise ValueError(
                f"known: got {self.known}, expected 1 to {self.window - 1}: a window has {self.window} frames of level "
                "0, some to know and some to sample"
            )

    @property
    def stride(self) -> int:
        """Frames from the start of a window to that of the next one."""
        return self.window - self.known

    @property
    def whole(self) -> int:
        """Frames of the video in a window."""
        return self.window * self.scale

    def count(self, frames: int) -> int:
        """Windows that a video of so many frames takes."""
        return 1 + max(0, math.ceil((frames - self.whole) / (self.stride * self.scale)))

    def all(self) -> Iterator[Window]:
        """The windows of a video without end."""
        for number in itertools.count():
            yield Window(number, number * self.stride, self.known if number else 0)

    def until(self, frames: int) -> Iterator[Window]:
        """The windows of a video of so many frames, the last of which may reach beyond it."""
        return itertools.islice(self.all(), self.count(frames))

    def up_to(self, frames: int) -> Iterator[Window]:
        """The windows of a video that ends where the last one does, which may know more of the one before.

        Raises:
            ValueError: a number of frames at which no window can end.
        """
        self.check_end(frames)
        last = frames // self.scale - self.window
        for window in self.until(frames):
            moved = max(0, window.start - last)
            yield window._replace(start=window.start - moved, known=window.known + moved)

    def check_end(self, frames: int) -> None:
        """Checks that a window can end where a video of so many frames does; raises ValueError as :meth:`up_to`."""
        if frames < self.whole or frames % self.scale:
            raise ValueError(
                f"frames: got {frames}, expected at least {self.whole}, and a multiple of {self.scale}, where the last "
                "frame is given"
            )

    def borders(self, frames: int) -> list[int]:
        """The frames of a video with which a window begins to be new, but for the first."""
        return [(w.start + w.known) * self.scale for w in self.until(frames) if w.number]
