"""Generated clips for evaluation, one at a time, from a sampler or from a folder of files.

Each comes with its number. Ranks share the numbers; a clip depends on its number alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.decode import probe, read_clip
from hpdm.data.layout import find_videos
from hpdm.sampling import Sampler
from hpdm.video import to_uint8


def sample_clips(
    sampler: Sampler, first_seed: int, labels: Sequence[int] | None, count: int, batch: int
) -> Iterator[tuple[int, Tensor]]:
    """Samples ``count`` videos, ``batch`` at a time, and yields them one by one: number and uint8 ``[3, F, H, W]``.

    Args:
        sampler: of the model's system.
        first_seed: seed of the first video; the next videos take the next seeds.
        labels: the class of each video; ``None`` for a model without classes.
        count: number of videos.
        batch: videos sampled at a time. A video depends on its own seed and class alone (up to rounding).
    """
    batches = distributed.shard([range(first, min(first + batch, count)) for first in range(0, count, batch)])
    with _bar(sum(len(numbers) for numbers in batches)) as bar:
        for numbers in batches:
            classes = None if labels is None else torch.tensor([labels[n] for n in numbers])
            with distributed.single_process():
                videos = to_uint8(sampler([first_seed + n for n in numbers], classes)[-1])
            bar.update(len(numbers))
            yield from zip(numbers, videos)


def find_generated(folder: Path, count: int | None) -> list[Path]:
    """Videos of a folder that ``hpdm sample`` wrote: ``count``, evenly spread over the sorted names, or all.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no videos, or fewer than ``count``.
    """
    files = [Path(file.path) for file in find_videos(folder)[1]]
    if count is not None and len(files) < count:
        raise ValueError(f"generated: {folder} holds {len(files)} videos, expected at least the {count} samples")
    return files if count is None else [files[i * len(files) // count] for i in range(count)]


def class_of_file(path: Path, names: Sequence[str]) -> str:
    """The class in the name that ``hpdm sample`` gives a file, ``Class_seed7.mp4``.

    Raises:
        ValueError: another name, or another class than those of ``names``.
    """
    name = path.stem.rpartition("_seed")[0]
    if name not in names:
        raise ValueError(
            f"generated: got file {path.name}, expected CLASS_seedNUMBER.mp4 with one of {', '.join(names)}"
        )
    return name


def read_generated(files: Sequence[Path], frames: int, size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """Reads the first ``frames`` frames of every file, one by one: number and uint8 ``[3, frames, H, W]``.

    Raises:
        ValueError: a video that is shorter or of another size than (height, width).
        DecodeError: a damaged video.
    """
    numbers = distributed.shard(range(len(files)))
    with _bar(len(numbers)) as bar:
        for number in numbers:
            yield number, _read_frames(files[number], frames, size)
            bar.update()


def _read_frames(path: Path, frames: int, size: tuple[int, int]) -> Tensor:
    """The first frames of a video, uint8 ``[3, frames, H, W]``."""
    info = probe(path)
    if info.frames < frames or (info.height, info.width) != size:
        raise ValueError(
            f"generated: {path} has {info.frames} frames of {info.height}x{info.width}, expected at least {frames} of "
            f"{size[0]}x{size[1]}"
        )
    return torch.from_numpy(read_clip(path, range(frames)).frames).permute(3, 0, 1, 2).contiguous()


def _bar(total: int) -> tqdm:
    """A progress bar on rank 0, for its own videos."""
    return tqdm(total=total, unit="video", dynamic_ncols=True, disable=not distributed.is_first())
