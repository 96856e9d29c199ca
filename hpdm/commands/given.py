"""Frames that the user gives a video of ``hpdm sample``: the end of a clip, images, or a video of low resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from torch import Tensor

from hpdm.data.decode import DecodeError, VideoInfo, probe, read_clip
from hpdm.data.resize import resize_and_crop
from hpdm.data.suffixes import is_image
from hpdm.data.windows import Window
from hpdm.runs import Run


@dataclass(frozen=True)
class GivenOptions:
    """What a video starts from, ends with, or is made of.

    Raises:
        ValueError: several of the options, or images given as videos or the other way round.
    """

    frames: int | None = None
    """Frames of every video, those that are given included, for any number: videos that are longer than a clip are
    sampled window by window, and written while they are sampled. Default: a clip."""
    continues: Annotated[Path | None, tyro.conf.arg(name="continue")] = None
    """Video whose last frames every video starts with."""
    between: tuple[Path, Path] | None = None
    """Two images: the first frame and the last one of every video."""
    animate: Path | None = None
    """Image that every video starts with."""
    from_level: Path | None = None
    """Video of low resolution, which is brought up through the finer levels; --context-noise hides its faults."""

    def __post_init__(self) -> None:
        names = {"continue": self.continues, "between": self.between, "animate": self.animate}
        given = [name for name, value in (names | {"from_level": self.from_level}).items() if value is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: got {' and '.join(given)}, expected one of them")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames: got {self.frames}, expected at least 1")
        if self.from_level is not None and self.frames is not None:
            raise ValueError(f"frames: got {self.frames} with from_level, expected none: the video is as long as that")
        images = [*(self.between or ()), *([] if self.animate is None else [self.animate])]
        videos = [path for path in (self.continues, self.from_level) if path is not None]
        for path in images:
            if not is_image(path):
                raise ValueError(f"{given[0]}: got {path}, expected an image")
        for path in videos:
            if is_image(path):
                raise ValueError(f"{given[0]}: got {path}, an image, expected a video; --animate takes images")

    @property
    def is_long(self) -> bool:
        """Whether any of these was given, so that videos are sampled window by window."""
        values = (self.frames, self.continues, self.between, self.animate, self.from_level)
        return any(value is not None for value in values)


class Source:
    """A video or an image of the user, read as the run's training reads its clips.

    Args:
        run: gives size, stride and frame rate.
        path: the file.
        argument: the option that gave it, for messages.

    Raises:
        ValueError: it is no video or image.
    """

    def __init__(self, run: Run, path: Path, argument: str) -> None:
        self.run, self.path, self.argument = run, path, argument
        self.stride, self.fps = int(run.training.get("stride", 1)), run.training.get("fps")
        try:
            self.info: VideoInfo = probe(path)
        except (DecodeError, FileNotFoundError) as error:
            raise ValueError(f"{argument}: {error}") from None
        self.size: tuple[int, int] = run.config.resolution[1:]

    @property
    def length(self) -> int:
        """Frames of the video at the run's frame rate and stride."""
        most, least = self.info.frames * 64, 1  # at a higher rate than its own, frames repeat
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if self._window(middle).starts(self.info) else (least, middle - 1)
        return least

    def describe(self) -> str:
        """What is done with it, to be printed."""
        info, (height, width) = self.info, self.size
        rate = f" at {self.fps:g} frames per second" if self.fps else ""
        step = f", every {self.stride}. frame" if self.stride > 1 else ""
        return (
            f"{self.path.name}: {info.frames} frame(s) of {info.height}x{info.width}, read as in training: resized and "
            f"cropped to {height}x{width}{rate}{step}"
        )

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
        """Some of its frames, uint8 ``[1, 3, frames, H, W]``; after the end its last frame is repeated."""
        numbers = self._window(min(first + frames, self.length)).numbers(self.info, 0)[first:]
        return self._read(numbers + [numbers[-1]] * (frames - len(numbers)))

    def still(self, frames: int) -> Tensor:
        """Its first frame, repeated: uint8 ``[1, 3, frames, H, W]``."""
        return self._read([0]).expand(-1, -1, frames, -1, -1)

    def _window(self, frames: int) -> Window:
        return Window(frames, self.stride, self.fps)

    def _read(self, numbers: Sequence[int]) -> Tensor:
        def resized(frame: np.ndarray) -> np.ndarray:
            image = resize_and_crop(torch.from_numpy(frame)[None], self.size, self.info.pixel_aspect)
            return np.ascontiguousarray(image[0])

        try:
            frames = read_clip(self.path, numbers, transform=resized).frames
        except (DecodeError, FileNotFoundError, IndexError) as error:
            raise ValueError(f"{self.argument}: {error}") from None
        return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].contiguous()


def given_frames(options: GivenOptions, run: Run, known: int) -> tuple[int, dict[str, Any], list[str]]:
    """The number of frames of each video, what is given of it, and what to print about it.

    Args:
        options: of the command.
        run: gives the size of the parts.
        known: frames of the lowest part that a window knows of the one before.

    Returns:
        Frames, arguments of :meth:`hpdm.long_video.LongSampler.segments` for one video, and lines of text.

    Raises:
        ValueError: a file that cannot be read, or a clip that is too short.
    """
    parts = run.system.part_sizes(run.config)
    whole, scale = parts[-1][0], parts[-1][0] // parts[0][0]
    frames = options.frames or whole
    if options.continues is not None:
        source = Source(run, options.continues, "continue")
        clip = source.last(known * scale)
        text = f"{source.describe()}; the last {known * scale} frames of these are the first of every video"
        return frames, {"first": _parts_of(run, clip)}, [text]
    if options.animate is not None:
        source = Source(run, options.animate, "animate")
        return frames, {"first": _first_frames(_parts_of(run, source.still(scale)))}, [source.describe()]
    if options.between is not None:
        sources = [Source(run, path, "between") for path in options.between]
        first, last = (_first_frames(_parts_of(run, source.still(scale))) for source in sources)
        return frames, {"first": first, "last": last}, [source.describe() for source in sources]
    if options.from_level is not None:
        source = Source(run, options.from_level, "from_level")
        count = level_like(parts, source.info) + 1
        text = f"{source.describe()}; it is taken for the levels up to {count - 1}"

        def levels(window: int) -> list[Tensor]:
            return _parts_of(run, source.part(window * (whole - known * scale), whole))[:count]

        return source.length, {"levels": levels}, [text]
    return frames, {}, []


def level_like(parts: Sequence[tuple[int, int, int]], info: VideoInfo) -> int:
    """The number of the largest part, but not the last, that a video has the resolution for; 0 for a smaller one."""
    fitting = [
        n for n, (_, height, width) in enumerate(parts[:-1]) if min(info.height / height, info.width / width) >= 1
    ]
    return max(fitting, default=0)


def _parts_of(run: Run, clip: Tensor) -> list[Tensor]:
    """All parts of a clip, uint8 ``[1, 3, F, H, W]``."""
    return [run.system.real_part(run.config, clip, part) for part in range(len(run.system.part_sizes(run.config)))]


def _first_frames(parts: Sequence[Tensor]) -> list[Tensor]:
    """The first frame of each part: a still image says nothing of the others."""
    return [part[:, :, :1] for part in parts]
