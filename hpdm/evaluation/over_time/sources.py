"""Long videos, a piece at a time: sampled ones, files that ``hpdm sample`` wrote, and real clips.

Ranks share the videos; a video depends on its own number alone.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import VideoInfo, probe, read_clip
from hpdm.data.resize import resizing
from hpdm.long_video import LongSampler
from hpdm.video import to_uint8

Pieces = Iterator[tuple[int, Tensor]]
"""The number of a video, and its next frames, uint8 ``[3, n, H, W]``. Pieces of several videos may alternate."""

PIECE = 64
"""Frames that are read of a file at a time."""


def sample_long(
    sampler: LongSampler, first_seed: int, labels: Sequence[int] | None, count: int, batch: int, frames: int
) -> Pieces:
    """Samples long videos, ``batch`` at a time, and yields their segments.

    Args:
        sampler: of the model's system.
        first_seed: seed of the first video; the next videos take the next seeds.
        labels: the class of each video; ``None`` to sample without classes.
        count: number of videos.
        batch: videos sampled at a time. A video depends on its own seed and class alone (up to rounding).
        frames: of every video.

    Raises:
        FloatingPointError: a video holds numbers that are not finite.
    """
    batches = distributed.shard([range(first, min(first + batch, count)) for first in range(0, count, batch)])
    with _bar(frames * sum(len(numbers) for numbers in batches)) as bar:
        for numbers in batches:
            classes = None if labels is None else torch.tensor([labels[n] for n in numbers])
            segments = sampler.segments([first_seed + n for n in numbers], frames, classes)
            while True:
                with distributed.single_process():
                    segment = next(segments, None)
                if segment is None:
                    break
                if not segment.frames.isfinite().all():
                    raise FloatingPointError(
                        f"segment {segment.number} holds numbers that are not finite; lower --guidance or take other "
                        "weights"
                    )
                yield from zip(numbers, to_uint8(segment.frames))
                bar.update(segment.frames.shape[2] * len(numbers))


def read_files(files: Sequence[Path], frames: int, skip: Container[int] = ()) -> Pieces:
    """Reads the first frames of video files, which :func:`check_file` has passed, but for the numbers ``skip``.

    Raises:
        DecodeError: a damaged video.
    """
    numbers = [number for number in distributed.shard(range(len(files))) if number not in skip]
    with _bar(frames * len(numbers)) as bar:
        for number in numbers:
            for start in range(0, frames, PIECE):
                clip = read_clip(files[number], range(start, min(start + PIECE, frames)))
                yield number, torch.from_numpy(clip.frames).permute(3, 0, 1, 2)
                bar.update(len(clip.frames))


def check_file(path: Path, frames: int, size: tuple[int, int]) -> None:
    """Checks that a generated video is long enough, and of the run's size (height, width).

    Raises:
        ValueError: it is not.
    """
    info = probe(path)
    if info.frames < frames or (info.height, info.width) != size:
        raise ValueError(
            f"generated: {path} has {info.frames} frames of {info.height}x{info.width}, expected at least {frames} of "
            f"{size[0]}x{size[1]}"
        )


def read_real(dataset: VideoDataset, indices: Sequence[int]) -> Pieces:
    """Reads clips from their first frame, as many frames as the set's window has and as it spaces them.

    Args:
        dataset: its windows are as long as the videos to measure; :func:`check_real` has passed the clips.
        indices: the clips; the number of a video is its place among them.

    Raises:
        DecodeError: a damaged video.
    """
    places = distributed.shard(range(len(indices)))
    with _bar(dataset.frames * len(places)) as bar:
        for place in places:
            file = dataset.files[indices[place]]
            info = probe(file.source, timeout=dataset.timeout)
            numbers = dataset.window.numbers(info, 0)
            for start in range(0, len(numbers), PIECE):
                yield place, _read(dataset, info, indices[place], numbers[start : start + PIECE])
                bar.update(min(PIECE, len(numbers) - start))


def check_real(dataset: VideoDataset, indices: Sequence[int]) -> None:
    """Checks that clips are as long as the set's windows.

    Raises:
        ValueError: a clip is too short; the message says how to render longer ones.
    """
    for index in indices:
        info = probe(dataset.files[index].source, timeout=dataset.timeout)
        if not dataset.window.starts(info):
            needed = int(dataset.offsets(info.fps)[-1]) + 1
            raise ValueError(
                f"data: {dataset.files[index].path}: {dataset.window.too_short(info)}; render such clips with "
                f"`hpdm data synthetic --frames {needed}`"
            )


def _read(dataset: VideoDataset, info: VideoInfo, index: int, numbers: Sequence[int]) -> Tensor:
    """Frames of a clip at the set's size, uint8 ``[3, n, H, W]``."""
    source, transform = dataset.files[index].source, resizing(dataset.size, info.pixel_aspect)
    clip = read_clip(source, numbers, decoder=dataset.decoder, timeout=dataset.timeout, transform=transform)
    return torch.from_numpy(clip.frames).permute(3, 0, 1, 2)


def _bar(total: int) -> tqdm:
    """A progress bar on rank 0 that counts the frames of its own videos."""
    return tqdm(total=total, unit="frame", dynamic_ncols=True, disable=not distributed.is_first())
