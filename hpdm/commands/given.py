"""Frames that the user gives a video of ``hpdm sample``: the end of a clip, images, or a video of low resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from torch import Tensor

from hpdm.checks import at_least
from hpdm.commands.source import Source, probe_source
from hpdm.data.decode import VideoInfo
from hpdm.data.suffixes import IMAGE_SUFFIXES, is_image, listed
from hpdm.frames import NOT_TRAINED
from hpdm.runs import Run
from hpdm.windows import Windows


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
    """Video of low resolution, which is brought up through the finer levels; --context-noise hides its faults. One of
    exactly a level's height and width is that level, frame for frame, as --save-levels writes it. Any other is read as
    in training, and averaged down to the levels that it has the resolution for."""

    def __post_init__(self) -> None:
        at_least(self, 1, "frames")
        given = list(self.files)
        if len(given) > 1:
            raise ValueError(f"{given[0]}: got {' and '.join(given)}, expected one of them")
        if self.from_level is not None and self.frames is not None:
            raise ValueError(f"frames: got {self.frames} with from_level, expected none: the video is as long as that")
        for name, paths in self.files.items():
            of_images = name in ("between", "animate")
            for path in paths:
                if of_images and not is_image(path):
                    raise ValueError(f"{name}: got {path}, expected an image ({listed(IMAGE_SUFFIXES)})")
                if not of_images and is_image(path):
                    raise ValueError(f"{name}: got {path}, an image, expected a video; --animate takes images")

    @property
    def files(self) -> dict[str, tuple[Path, ...]]:
        """The files of the user, by the name of the option that gave them."""
        one_file = {"continue": self.continues, "animate": self.animate, "from_level": self.from_level}
        files: dict[str, tuple[Path, ...]] = {name: (path,) for name, path in one_file.items() if path is not None}
        if self.between is not None:
            files["between"] = self.between
        return files

    @property
    def is_long(self) -> bool:
        """Whether any of these was given, so that videos are sampled window by window."""
        return self.frames is not None or bool(self.files)

    @property
    def names(self) -> str:
        """The options that were given, for messages."""
        return " and ".join([*(["frames"] if self.frames is not None else []), *self.files])

    def check_not_written(self, outputs: Sequence[Path]) -> None:
        """Checks that the command does not replace a file that it reads.

        Raises:
            ValueError: it would.
        """
        written = {path.resolve() for path in outputs}
        for name, paths in self.files.items():
            for path in paths:
                if path.resolve() in written:
                    raise ValueError(f"{name}: got {path}, which this command would replace; choose another --out")


class Given(NamedTuple):
    """The videos that the options ask for."""

    frames: int
    """Of each video."""
    arguments: dict[str, Any]
    """Of :meth:`hpdm.long_video.LongSampler.segments`, for one video."""
    notes: list[str]
    """Lines to print: what is done with the files."""


def given_frames(options: GivenOptions, run: Run, windows: Windows) -> Given:
    """Reads what the user gives.

    Args:
        options: of the command.
        run: gives the size of the parts.
        windows: how those of the videos follow each other.

    Raises:
        ValueError: a file that cannot be read, a clip that is too short, or a run that cannot go on from frames.
    """
    parts = run.system.part_sizes(run.config)
    known, scale = windows.known, windows.scale
    frames = options.frames or parts[-1][0]
    if options.from_level is not None:
        level = GivenLevel(run, options.from_level, (parts[0][0] - known) * scale)
        return Given(level.frames, {"levels": level}, [level.note])
    for name, paths in options.files.items():
        if not getattr(run.config, "known_frames", False):
            raise ValueError(f"{name}: got {paths[0]}, expected none: {NOT_TRAINED}")
    if options.continues is not None:
        source = Source.of_run(run, options.continues, "continue")
        note = f"{source.describe()}; the last {known * scale} frames of these are the first of every video"
        return Given(frames, {"first": _parts_of(run, source.last(known * scale))}, [note])
    if options.animate is not None:
        image = _image(run, options.animate, "animate")
        return Given(frames, {"first": _still(run, image, scale)}, [image.describe()])
    if options.between is not None:
        images = [_image(run, path, "between") for path in options.between]
        first, last = (_still(run, image, scale) for image in images)
        return Given(frames, {"first": first, "last": last}, [image.describe() for image in images])
    return Given(frames, {}, [])


class GivenLevel:
    """A video of low resolution, as the lowest parts of the windows of a video.

    Args:
        run: gives the size of the parts.
        path: the file.
        stride: frames of the result from the start of a window to that of the next one.

    Raises:
        ValueError: it cannot be read, or the run has one part only.
    """

    def __init__(self, run: Run, path: Path, stride: int) -> None:
        self.run, self.stride = run, stride
        parts = run.system.part_sizes(run.config)
        if len(parts) == 1:
            raise ValueError(f"from_level: got {path} for a run of one level, expected one of several")
        info = probe_source("from_level", path)
        self.part = level_like(parts, info)
        """Number of the part that it is taken for; those below are its averages."""
        size, whole = parts[self.part], run.config.resolution
        growth = [of_whole // of_part for of_whole, of_part in zip(whole, size)]
        if _shown_size(info) == size[1:]:
            self.source = Source("from_level", info, size[1:])
            self.note = (
                f"{path.name}: {info.frames} frame(s) of {info.height}x{info.width}, taken for level {self.part} frame "
                f"for frame: each stands for {growth[0]} frame(s) of the video"
            )
        else:
            growth[0] = 1
            self.source = Source.of_run(run, path, "from_level", size[1:])
            self.note = f"{self.source.describe()}; taken for level {self.part}"
        self.repeats = growth
        """Frames, rows and columns of the result for each that is read."""
        self.frames = self.source.length * self.repeats[0]
        """Frames of the result."""

    def __call__(self, window: int) -> list[Tensor]:
        """The given parts of a window, ``[1, C, f, h, w]`` in [-1, 1]; after the end the last frame is repeated."""
        growth = self.repeats[0]
        clip = self.source.part(window * self.stride // growth, self.run.config.resolution[0] // growth)
        for axis, repeats in enumerate(self.repeats, start=2):
            clip = clip.repeat_interleave(repeats, dim=axis)  # what the parts are averages of, without a loss
        return _parts_of(self.run, clip)[: self.part + 1]


def level_like(parts: Sequence[tuple[int, int, int]], info: VideoInfo) -> int:
    """The number of the largest part, but not the last, that a video has the resolution for; 0 for a smaller one."""
    shown = _shown_size(info)
    fitting = [n for n, (_, height, width) in enumerate(parts[:-1]) if shown[0] >= height and shown[1] >= width]
    return max(fitting, default=0)


def _shown_size(info: VideoInfo) -> tuple[int, int]:
    """Height and width of a video as a player shows it."""
    return info.height, round(info.width * info.pixel_aspect)


def _parts_of(run: Run, clip: Tensor) -> list[Tensor]:
    """All parts of a clip, uint8 ``[1, 3, F, H, W]``: ``[1, 3, f, h, w]`` in [-1, 1] each."""
    return [run.system.real_part(run.config, clip, part) for part in range(len(run.system.part_sizes(run.config)))]


def _image(run: Run, path: Path, argument: str) -> Source:
    """An image as the run's training reads it, which is one frame whatever the rate."""
    return Source(argument, probe_source(argument, path), run.config.resolution[1:])


def _still(run: Run, image: Source, scale: int) -> list[Tensor]:
    """The first frame of each part of an image: it says nothing of the others."""
    return [part[:, :, :1] for part in _parts_of(run, image.first().expand(-1, -1, scale, -1, -1))]
