"""Generated clips for evaluation, one at a time, from a sampler or from a folder of files.

Each comes with its number, at every level that is measured. Ranks share the numbers; a clip depends on its own alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.decode import probe, read_clip
from hpdm.data.layout import find_videos
from hpdm.evaluation.levels import Level
from hpdm.printable import as_file_name
from hpdm.sampling import Sampler
from hpdm.video import to_uint8

Clips = Iterator[tuple[int, list[Tensor]]]
"""Clips one by one: the number, and uint8 ``[3, F_l, H_l, W_l]`` for each level that is measured."""


class Score(Protocol):
    """A score of many clips, which are added one by one."""

    def add(self, number: int, video: Tensor) -> None:
        """Adds a clip of this rank: its number among the clips of all ranks, and uint8 ``[3, F, H, W]``."""

    def result(self) -> dict[str, Any]:
        """The score of all clips. A collective: all ranks return the same."""


def measure(clips: Clips, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The results of one score for each level of the clips, which are read once. A collective."""
    for number, videos in clips:
        for score, video in zip(scores, videos):
            score.add(number, video)
    return [score.result() for score in scores]


_LOWER_LEVEL = re.compile(r"_seed\d+(_overlap_\w+)?_level\d+$")
"""The end of the name that ``hpdm sample --save-levels`` gives a lower level."""


def sample_clips(
    sampler: Sampler,
    first_seed: int,
    labels: Sequence[int] | None,
    count: int,
    batch: int,
    levels: Sequence[Level],
    given: Callable[[Sequence[int]], list[Tensor]] | None = None,
) -> Clips:
    """Samples ``count`` videos, ``batch`` at a time, and yields them one by one.

    Args:
        sampler: of the model's system.
        first_seed: seed of the first video; the next videos take the next seeds.
        labels: the class of each video; ``None`` for a model without classes.
        count: number of videos.
        batch: videos sampled at a time. A video depends on its own seed and class alone (up to rounding).
        levels: the levels to yield.
        given: returns the first levels of the videos of some numbers, which are not sampled; ``None`` to sample all.
    """
    batches = distributed.shard([range(first, min(first + batch, count)) for first in range(0, count, batch)])
    with _bar(sum(len(numbers) for numbers in batches)) as bar:
        for numbers in batches:
            classes = None if labels is None else torch.tensor([labels[n] for n in numbers])
            finished = () if given is None else given(numbers)
            with distributed.single_process():
                parts = sampler([first_seed + n for n in numbers], classes, finished=finished)
            videos = [to_uint8(parts[level.number]) for level in levels]
            bar.update(len(numbers))
            yield from ((n, [video[row] for video in videos]) for row, n in enumerate(numbers))


def find_generated(folder: Path, count: int | None) -> list[Path]:
    """Videos of a folder that ``hpdm sample`` wrote: ``count``, evenly spread over the sorted names, or all.

    Files of lower levels are left out; :func:`files_of_levels` finds them.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no videos, or fewer than ``count``.
    """
    found = (Path(file.path) for file in find_videos(folder)[1])
    files = [path for path in found if not _LOWER_LEVEL.search(path.stem)]
    if not files or (count is not None and len(files) < count):
        expected = "some" if count is None else f"at least the {count} samples"
        raise ValueError(f"generated: {folder} holds {len(files)} videos, expected {expected}")
    return files if count is None else [files[i * len(files) // count] for i in range(count)]


def files_of_levels(files: Sequence[Path], levels: Sequence[Level]) -> list[list[Path]]:
    """For each video its files at ``levels``, lower ones with the names that ``hpdm sample --save-levels`` gives them.

    Raises:
        FileNotFoundError: a level's file is missing.
    """
    found = [
        [path if level.is_last else path.with_stem(f"{path.stem}_level{level.number}") for level in levels]
        for path in files
    ]
    for path in (path for row in found for path in row if not path.is_file()):
        raise FileNotFoundError(f"generated: {path} is missing, expected the files of `hpdm sample --save-levels`")
    return found


def class_of_file(path: Path, names: Sequence[str]) -> str:
    """The class in the name that ``hpdm sample`` gives a file, ``Class_seed7.mp4``.

    Raises:
        ValueError: another name, or another class than those of ``names``.
    """
    stem = path.stem.rpartition("_seed")[0]
    name = next((name for name in names if as_file_name(name) == stem), None)
    if name is None:
        raise ValueError(
            f"generated: got file {path.name}, expected CLASS_seedNUMBER.mp4 with one of {', '.join(names)}"
        )
    return name


def read_generated(files: Sequence[Sequence[Path]], levels: Sequence[Level], frames: int | None = None) -> Clips:
    """Reads the first ``frames`` frames of every file, all of a level that has no more.

    Args:
        files: for each video its files at ``levels``.
        levels: the levels; they give the sizes.
        frames: frames of a video; ``None`` for all.

    Raises:
        ValueError: a video that is shorter or of another size than its level.
        DecodeError: a damaged video.
    """
    numbers = distributed.shard(range(len(files)))
    sizes = [level.size for level in levels]
    wanted = [(f if frames is None else min(f, frames), height, width) for f, height, width in sizes]
    with _bar(len(numbers)) as bar:
        for number in numbers:
            yield number, [_read_frames(path, *size) for path, size in zip(files[number], wanted)]
            bar.update()


def _read_frames(path: Path, frames: int, height: int, width: int) -> Tensor:
    """The first frames of a video, uint8 ``[3, frames, H, W]``."""
    info = probe(path)
    if info.frames < frames or (info.height, info.width) != (height, width):
        raise ValueError(
            f"generated: {path} has {info.frames} frames of {info.height}x{info.width}, expected at least {frames} of "
            f"{height}x{width}"
        )
    return torch.from_numpy(read_clip(path, range(frames)).frames).permute(3, 0, 1, 2).contiguous()


def _bar(total: int) -> tqdm:
    """A progress bar on rank 0, for its own videos."""
    return tqdm(total=total, unit="video", dynamic_ncols=True, disable=not distributed.is_first())
