"""The options of ``hpdm evaluate --metrics motion fvd kvd`` for long videos, measured along time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from hpdm.evaluation.over_time.borders import CLIP
from hpdm.long_video import LongOptions


@dataclass(frozen=True)
class OverTimeOptions:
    """Which long videos are measured along time.

    Raises:
        ValueError: too few frames, or another option without them.
        FileNotFoundError: no folder for the plot.
    """

    frames: Annotated[int | None, tyro.conf.arg(name="over-time")] = None
    """Motion, fvd, kvd: measure videos of so many frames, 16 frames at a time from the first to the last; motion also
    where windows meet. --generated must have videos of that length, and for motion so must --data."""
    unlabeled: bool = False
    """With --over-time: sample without classes; shape and color of each video are compared with those of its own first
    16 frames."""
    plot: Path | None = None
    """With --over-time: also draw the curves to this PNG."""
    long: Annotated[LongOptions, tyro.conf.arg(name="")] = field(default_factory=LongOptions)
    """How windows follow each other; with --generated those of the files, which say where windows meet."""

    def __post_init__(self) -> None:
        if self.frames is None:
            for name, value in (("unlabeled", self.unlabeled), ("plot", self.plot)):
                if value:
                    raise ValueError(f"{name}: got {value} without over_time, expected a number of frames with it")
            return
        if self.frames < 2 * CLIP:
            raise ValueError(f"over_time: got {self.frames}, expected at least {2 * CLIP} frames, two clips")
        if self.plot is not None:
            if self.plot.suffix.lower() != ".png":
                raise ValueError(f"plot: got {self.plot.name!r}, expected a name ending in .png")
            if not self.plot.parent.is_dir():
                raise FileNotFoundError(f"plot: folder {self.plot.parent} does not exist")
