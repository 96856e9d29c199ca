"""A video or an image of the user, read as the training of a run reads its clips."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpdm.data.decode import DecodeError, StalledError, VideoInfo, probe, read_clip
from hpdm.data.resize import resizing
from hpdm.data.windows import Window, all_frames
from hpdm.runs import Run


class Source:
    """Frames of a file at a size and a rate; frame 0 is the first of the file.

    Args:
        argument: the option that gave the file, for messages.
        info: about the file, of :func:`probe_source`.
        size: (height, width) to which frames are resized and cropped, as in training.
        stride, fps: as of :class:`hpdm.data.windows.Window`.

    Raises:
        ValueError: nothing tells the file's frame rate, which ``fps`` needs.
    """

    def __init__(
        self, argument: str, info: VideoInfo, size: tuple[int, int], stride: int = 1, fps: float | None = None
    ) -> None:
        self.argument, self.info, self.size, self.stride, self.fps = argument, info, size, stride, fps
        self.path = Path(info.path)
        if fps is not None and not info.fps:
            raise ValueError(f"{argument}: got {self.path} without a frame rate, which the run's fps={fps:g} needs")

    @classmethod
    def of_run(cls, run: Run, path: Path, argument: str, size: tuple[int, int] | None = None) -> Source:
        """A file as the run's training reads it, at its resolution or at ``size``.

        Raises:
            ValueError: it is no video or image, or as above.
        """
        info = probe_source(argument, path)
        size = run.config.resolution[1:] if size is None else size
        # Runs of earlier versions do not have this option.
        return cls(argument, info, size, int(run.training.get("stride", 1)), run.training.get("fps"))

    @cached_property
    def length(self) -> int:
        """Frames that it has at this rate."""
        return len(self._numbers)

    def describe(self) -> str:
        """What is done with it, to be printed."""
        info, (height, width) = self.info, self.size
        rate = f" at {self.fps:g} frames per second" if self.fps else ""
        step = f", one frame in {self.stride}" if self.stride > 1 else ""
        return (
            f"{self.path.name}: {info.frames} frame(s) of {info.height}x{info.width}, read as in training: resized and "
            f"cropped to {height}x{width}{rate}{step}"
        )

    def first(self) -> Tensor:
        """Its first frame, uint8 ``[1, 3, 1, H, W]``.

        Raises:
            ValueError: it cannot be decoded.
        """
        return self._read([0])

    def last(self, frames: int) -> Tensor:
        """Its last frames, uint8 ``[1, 3, frames, H, W]``.

        Raises:
            ValueError: it is too short, or cannot be decoded there.
        """
        window = self._window(frames)
        starts = window.starts(self.info)
        if not starts:
            raise ValueError(f"{self.argument}: {self.path}: {window.too_short(self.info)}")
        return self._read(window.numbers(self.info, starts - 1))

    def part(self, first: int, frames: int) -> Tensor:
        """Some of its frames, uint8 ``[1, 3, frames, H, W]``; after the end its last frame is repeated.

        Raises:
            ValueError: it cannot be decoded there.
        """
        wanted = np.arange(first, first + frames).clip(max=self.length - 1)
        return self._read(self._numbers[wanted].tolist())

    @cached_property
    def _numbers(self) -> np.ndarray:
        """The numbers in the file of all its frames, int64 ``[length]``."""
        return np.array(all_frames(self.info, self.stride, self.fps))

    def _window(self, frames: int) -> Window:
        return Window(frames, self.stride, self.fps)

    def _read(self, numbers: Sequence[int]) -> Tensor:
        try:
            frames = read_clip(self.path, numbers, transform=resizing(self.size, self.info.pixel_aspect)).frames
        except (DecodeError, StalledError, FileNotFoundError, IndexError) as error:
            raise ValueError(f"{self.argument}: {error}") from None
        return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].contiguous()


def probe_source(argument: str, path: Path) -> VideoInfo:
    """Describes a file of the user.

    Args:
        argument: the option that gave it, for messages.
        path: the file.

    Raises:
        ValueError: no such file, or no video or image.
    """
    if not path.is_file():
        raise ValueError(
            f"{argument}: got {path}, which is {'a folder' if path.is_dir() else 'missing'}, expected a file"
        )
    try:
        return probe(path)
    except (DecodeError, StalledError) as error:
        raise ValueError(f"{argument}: {error}") from None
