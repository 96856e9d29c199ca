"""Sets of videos as uint8 clips: folders with or without classes, UCF-101's split files, tar shards, a resumable order.

Every choice is a pure function of (seed, epoch, index) or (seed, step): it depends neither on how many processes read
nor on what was read before, so a run resumed at step s sees the clips that it would have seen.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from hpdm.data.decode import DECODERS, TIMEOUT_S, DecodeError, Decoder, VideoInfo, probe, read_clip
from hpdm.data.layout import VideoFile, add_captions, check_captions, find_split_file, find_videos, has_videos
from hpdm.data.shards import find_shards, read_shards

# A file may be damaged, and may go or change after it was looked into.
_UNREADABLE = (DecodeError, FileNotFoundError, IndexError)
_CHUNK = 64  # frames decoded at a time when a whole clip goes to the cache


class ClipItem(TypedDict):
    """One item of :class:`VideoDataset`."""

    video: Tensor  # uint8 [3, F, H, W]
    label: int  # 0 where the set has no classes
    caption: str  # "" where captions were not asked for
    path: str
    start: int  # number of the first frame in the file
    decoder: str  # "decord" or "pyav"


class ClipKey(NamedTuple):
    """What :class:`ClipSampler` asks a dataset for: clip number ``clip``, as the window drawn in ``epoch``."""

    clip: int
    epoch: int


class ShortClipError(ValueError):
    """A clip with fewer frames than a window needs."""


class VideoDataset(Dataset[ClipItem]):
    """Clips of a fixed shape out of a folder of videos or out of tar shards.

    Four layouts, told apart by what the folder holds:

    - class folders, ``root/Class/clip.avi``: labels follow ``classInd.txt`` where there is one, else the sorted names;
    - the same with UCF-101's official split files (``trainlist01.txt``, ``testlist01.txt``, ``classInd.txt``, in
      ``root``, in ``root/ucfTrainTestlist`` or beside ``root``), when ``split`` or ``split_file`` is given; a listed
      clip may have another video suffix, as transcoded copies do;
    - a flat folder of videos: no classes, every label is 0 and ``class_names`` is empty;
    - tar shards in webdataset's layout (:mod:`hpdm.data.shards`): ``root`` is their folder, one ``.tar``, or a pattern
      such as ``data/shard-{000000..000009}.tar`` or ``data/*.tar``. They have no ``split``.

    A clip or window that turns out damaged is replaced by the next good clip in the order of files, with a warning that
    names it. Damage that a codec conceals goes unnoticed here: ``hpdm data inspect --full`` finds it.

    Args:
        root: the folder, or a pattern of shards.
        frames: frames of a window, >= 1.
        size: height and width of the output, or one int for both. Frames are resized (antialiased bilinear) to just
            cover it, then cropped at the centre.
        stride: step between frames of a window, >= 1; a window spans ``(frames - 1) * stride + 1`` frames.
        fps: frames per second, > 0, that clips are resampled to before ``stride`` counts: each frame of a window is the
            clip's nearest in time, going by its average rate. A clip whose container gives no rate is skipped like a
            damaged one. ``None`` takes frames as they are stored; where clips then differ in rate, a warning says so.
        split: ``"train"`` or ``"test"`` of the official split, ``None`` for every clip.
        fold: which official split, 1 to 3.
        split_file: a list of clips in the official format, instead of ``split``.
        captions: read a caption for every clip, from ``captions.jsonl`` in ``root`` (lines ``{"file":
            "relative/path.mp4", "caption": "..."}``) or from a text file of the clip's name beside it; in shards, from
            ``key.txt`` or ``key.json``.
        train: ``True`` draws the window at random from (seed, epoch, index); ``False`` takes the middle one.
        short: a clip shorter than a window is an ``"error"``, is replaced like a damaged one (``"skip"``), or is played
            in a ``"loop"``.
        seed: >= 0.
        cache_bytes: bound on memory for clips kept whole at the output size, shared out between the loader's processes;
            0 for none. What fits first stays. The cache changes the time of a read, never its result.
        decoder: as :func:`hpdm.data.decode.read_clip`.
        timeout: seconds for one read.

    Raises:
        FileNotFoundError: no such folder, shard, split file or listed clip.
        ValueError: a folder without videos, a damaged shard, a class that the set does not have, clips without a
            caption, a bad number.

    Reading an item raises :class:`ShortClipError` or, when no clip of the set is good,
    :class:`hpdm.data.decode.DecodeError`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        frames: int,
        size: int | tuple[int, int],
        stride: int = 1,
        fps: float | None = None,
        split: Literal["train", "test"] | None = None,
        fold: int = 1,
        split_file: str | os.PathLike[str] | None = None,
        captions: bool = False,
        train: bool = True,
        short: Literal["error", "skip", "loop"] = "error",
        seed: int = 0,
        cache_bytes: int = 0,
        decoder: Decoder = "auto",
        timeout: float = TIMEOUT_S,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        for name, value, least in (
            ("frames", frames, 1),
            ("stride", stride, 1),
            ("size", min(height, width), 1),
            ("fold", fold, 1),
            ("seed", seed, 0),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected >= {least}")
        for name, choice, choices in (
            ("split", split, (None, "train", "test")),
            ("short", short, ("error", "skip", "loop")),
            ("decoder", decoder, DECODERS),
        ):
            if choice not in choices:
                raise ValueError(f"{name}: got {choice!r}, expected one of {', '.join(map(repr, choices))}")
        if fps is not None and not 0 < fps < float("inf"):
            raise ValueError(f"fps: got {fps}, expected > 0")
        if split is not None and split_file is not None:
            raise ValueError("split_file: got both split and split_file, expected one of them")
        self.root = Path(root)
        self.frames, self.stride, self.fps, self.train, self.short, self.seed = frames, stride, fps, train, short, seed
        self.size = (height, width)
        self.cache_bytes, self.decoder, self.timeout = cache_bytes, decoder, timeout
        self.class_names, self.files = find_clips(
            root, split=split, fold=fold, split_file=split_file, captions=captions
        )
        if captions:
            check_captions(root, self.files)
        self._infos: dict[int, VideoInfo] = {}
        self._bad: dict[int, str] = {}
        self._warned: set[int] = set()
        self._first: VideoInfo | None = None  # the first clip looked into, whose rate is the others' to share
        self._rates_differ = False
        self._uncacheable: set[int] = set()
        self._cache: dict[int, tuple[Tensor, str]] = {}
        self._cached_bytes = 0

    @property
    def labels(self) -> list[int] | None:
        """The label of each file; ``None`` where the set has no classes."""
        return [file.label for file in self.files] if self.class_names else None

    def offsets(self, fps: float) -> np.ndarray:
        """Numbers of a window's frames, counted from its first, in a clip of ``fps`` frames per second: int64 [F]."""
        steps = np.arange(self.frames) * self.stride
        return steps if self.fps is None else np.floor(steps * (fps / self.fps) + 0.5).astype(np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict[str, object]:
        # A spawned reader fills its own share of the cache.
        return {**self.__dict__, "_cache": {}, "_cached_bytes": 0}

    def __getitem__(self, key: int | ClipKey) -> ClipItem:
        """The window of clip ``key`` (epoch 0), or of a :class:`ClipKey`.

        Raises:
            IndexError: outside of the set.
            ShortClipError: a clip shorter than a window, under ``short="error"``.
            DecodeError: this clip and every other one is damaged or too short.
        """
        index, epoch = key if isinstance(key, tuple) else (int(key), 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, expected one of {len(self)} clips")
        index %= len(self)
        reasons = []
        for step in range(len(self)):
            other = (index + step) % len(self)
            reason = self._bad.get(other) or self._examine(other)
            if reason is None:
                try:
                    return self._read(other, epoch)
                except _UNREADABLE as error:
                    # Only this window: what a clip gives must not depend on which windows were read before.
                    reason = str(error)
            if other not in self._warned:
                self._warned.add(other)
                warnings.warn(f"clip skipped: {reason}", RuntimeWarning, stacklevel=2)
            reasons.append(reason)
        raise DecodeError(f"{self.root}: none of the {len(self)} clips can be used; the first: {reasons[0]}")

    def _examine(self, index: int) -> str | None:
        """Why a clip cannot be used at all, ``None`` for a good one; looks into the file once."""
        path, source = self.files[index].path, self.files[index].source
        if index not in self._infos:
            try:
                self._infos[index] = probe(source, timeout=self.timeout)
            except _UNREADABLE as error:
                self._bad[index] = str(error)
                return self._bad[index]
            if self.fps is None:
                self._compare_rates(self._infos[index])
        info = self._infos[index]
        if self.fps is not None and not info.fps:
            self._bad[index] = f"{path}: the container gives no frame rate, which fps={self.fps:g} needs"
            return self._bad[index]
        span = int(self.offsets(info.fps)[-1]) + 1
        if info.frames >= span or self.short == "loop":
            return None
        rate = "" if self.fps is None else f", fps={self.fps:g} of {info.fps:g}"
        reason = (
            f"{path}: got {info.frames} frames, expected >= {span} (frames={self.frames}, stride={self.stride}{rate})"
        )
        if self.short == "error":
            raise ShortClipError(reason)
        self._bad[index] = reason
        return reason

    def _compare_rates(self, info: VideoInfo) -> None:
        worker = get_worker_info()
        if self._rates_differ or not info.fps or (worker is not None and worker.id > 0):
            return  # each process sees clips of the whole set: one of them is enough to warn once
        self._first = self._first or info
        if abs(info.fps / self._first.fps - 1) > 0.01:  # 29.97 and 30 are alike
            self._rates_differ = True
            warnings.warn(
                f"{self.root}: clips differ in frame rate ({info.path}: {info.fps:g}, {self._first.path}: "
                f"{self._first.fps:g} frames per second): a window spans the same frames of each, not the same time; "
                "pass fps to resample them to one rate",
                RuntimeWarning,
                stacklevel=2,
            )

    def _read(self, index: int, epoch: int) -> ClipItem:
        file, total = self.files[index], self._infos[index].frames
        offsets = self.offsets(self._infos[index].fps)
        last = max(0, total - int(offsets[-1]) - 1)
        start = last // 2
        if self.train:
            start = int(np.random.default_rng([self.seed, epoch, index]).integers(last + 1))
        numbers = ((start + offsets) % total).tolist()
        cached = self._cache.get(index) or self._fill_cache(index, total)
        if cached is not None:
            whole, decoder = cached
            window = whole[numbers]
        else:
            clip = read_clip(file.source, numbers, decoder=self.decoder, timeout=self.timeout)
            window, decoder = resize_and_crop(torch.from_numpy(clip.frames), self.size), clip.decoder
        video = window.permute(3, 0, 1, 2).contiguous()
        return {
            "video": video,
            "label": file.label,
            "caption": file.caption,
            "path": file.path,
            "start": start,
            "decoder": decoder,
        }

    def _fill_cache(self, index: int, total: int) -> tuple[Tensor, str] | None:
        worker = get_worker_info()
        share = self.cache_bytes // (worker.num_workers if worker else 1)
        need = total * self.size[0] * self.size[1] * 3
        if self._cached_bytes + need > share or index in self._uncacheable:
            return None
        parts, decoder = [], ""
        for first in range(0, total, _CHUNK):
            numbers = range(first, min(first + _CHUNK, total))
            try:
                clip = read_clip(self.files[index].source, numbers, decoder=self.decoder, timeout=self.timeout)
            except _UNREADABLE:
                self._uncacheable.add(index)  # damaged somewhere: a window may still be good, as without a cache
                return None
            decoder = clip.decoder
            parts.append(resize_and_crop(torch.from_numpy(clip.frames), self.size))
        self._cache[index] = torch.cat(parts), decoder
        self._cached_bytes += need
        return self._cache[index]


def find_clips(
    root: str | os.PathLike[str],
    *,
    split: Literal["train", "test"] | None = None,
    fold: int = 1,
    split_file: str | os.PathLike[str] | None = None,
    captions: bool = False,
) -> tuple[list[str], list[VideoFile]]:
    """Class names (empty for none) and clips of a folder or of shards; arguments and errors as :class:`VideoDataset`.

    With ``captions``, a clip has the caption that is there, ``""`` for none.
    """
    shards = find_shards(root)
    if shards is None:
        names, files = find_videos(root, find_split_file(Path(root), split, fold) if split is not None else split_file)
        return names, add_captions(root, files) if captions else files
    if split is not None or split_file is not None:
        raise ValueError(f"split: got one for shards ({root}), which have none; name its shards, as in 'train-*.tar'")
    if Path(root).is_dir() and has_videos(root):
        raise ValueError(f"root: {root} holds videos beside shards ({shards[0].name}), expected one")
    names, files = read_shards(shards)
    return names, files if captions else [replace(file, caption="") for file in files]


class ClipSampler(Sampler[list[ClipKey]]):
    """Endless shuffled batches, each a pure function of (seed, step): a run resumes from its step number alone.

    Give it to a ``DataLoader`` as ``batch_sampler``. Every epoch is a fresh permutation and the epochs are strung
    together, so all batches are full and every clip comes equally often.

    Args:
        length: clips in the set, >= 1.
        batch: clips of one batch on one process, >= 1.
        seed: >= 0.
        start: the first step, >= 0.
        rank, world: this process and the number of processes; one step takes ``batch * world`` clips of the order.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self, length: int, batch: int, seed: int = 0, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        for name, value, least in (
            ("length", length, 1),
            ("batch", batch, 1),
            ("seed", seed, 0),
            ("start", start, 0),
            ("world", world, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected >= {least}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank}, expected 0..{world - 1} for world={world}")
        self.length, self.batch, self.seed = length, batch, seed
        self.start, self.rank, self.world = start, rank, world
        self._order: tuple[int, np.ndarray] | None = None

    def keys(self, step: int) -> list[ClipKey]:
        """The batch of one step."""
        first = (step * self.world + self.rank) * self.batch
        return [self._key(first + i) for i in range(self.batch)]

    def _key(self, position: int) -> ClipKey:
        epoch, place = divmod(position, self.length)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length)
        return ClipKey(int(self._order[1][place]), epoch)

    def __iter__(self) -> Iterator[list[ClipKey]]:
        step = self.start
        while True:
            yield self.keys(step)
            step += 1


def resize_and_crop(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes frames to just cover ``size`` (antialiased bilinear, aspect kept) and crops the centre.

    Args:
        frames: uint8 ``[F, H, W, C]``.
        size: (height, width).

    Returns:
        uint8 ``[F, height, width, C]``; the input itself where the size is right already.
    """
    height, width = frames.shape[1:3]
    scale = max(size[0] / height, size[1] / width)
    if scale != 1:
        target = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
        planes = frames.permute(0, 3, 1, 2)
        planes = F.interpolate(planes, target, mode="bilinear", align_corners=False, antialias=True)
        frames = planes.permute(0, 2, 3, 1)
        height, width = target
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return frames[:, top : top + size[0], left : left + size[1]]
