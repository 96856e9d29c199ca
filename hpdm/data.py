"""Sets of video files as uint8 clips: folders with or without classes, UCF-101's split files, a resumable order.

Every choice is a pure function of (seed, epoch, index) or (seed, step): it depends neither on how many processes read nor on
what was read before, so a run resumed at step s sees the clips that it would have seen.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from hpdm.decode import DECODERS, TIMEOUT_S, DecodeError, Decoder, VideoInfo, probe, read_clip

log = logging.getLogger(__name__)

SUFFIXES = frozenset(".avi .gif .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .ts .webm .wmv".split())
SPLIT_FOLDER = "ucfTrainTestlist"
_CHUNK = 64  # frames decoded at a time when a whole clip goes to the cache


class ClipItem(TypedDict):
    """One item of :class:`VideoDataset`."""

    video: Tensor  # uint8 [3, F, H, W]
    label: int  # 0 where the set has no classes
    path: str
    start: int  # number of the first frame in the file
    decoder: str  # "decord" or "pyav"


class ClipKey(NamedTuple):
    """What :class:`ClipSampler` asks a dataset for: clip number ``clip``, as the window drawn in ``epoch``."""

    clip: int
    epoch: int


@dataclass(frozen=True)
class VideoFile:
    """A file of a set and its label."""

    path: str
    label: int


class ShortClipError(ValueError):
    """A clip with fewer frames than a window needs."""


class VideoDataset(Dataset[ClipItem]):
    """Clips of a fixed shape out of a folder of videos.

    Three layouts, told apart by what the folder holds:

    - class folders, ``root/Class/clip.avi``: labels follow ``classInd.txt`` where there is one, else the sorted names;
    - the same with UCF-101's official split files (``trainlist01.txt``, ``testlist01.txt``, ``classInd.txt`` in ``root``,
      in ``root/ucfTrainTestlist`` or beside ``root``), when ``split`` or ``split_file`` is given;
    - a flat folder of videos: no classes, every label is 0 and ``class_names`` is empty.

    A clip that turns out damaged is replaced by the next good one in the order of files, with a warning that names it.

    Args:
        root: the folder.
        frames: frames of a window, >= 1.
        size: height and width of the output, or one int for both. Frames are resized (antialiased bilinear) to just cover
            it, then cropped at the centre.
        stride: step between frames of a window, >= 1; a window spans ``(frames - 1) * stride + 1`` frames.
        split: ``"train"`` or ``"test"`` of the official split, ``None`` for every clip.
        fold: which official split, 1 to 3.
        split_file: a list of clips in the official format, instead of ``split``.
        train: ``True`` draws the window at random from (seed, epoch, index); ``False`` takes the middle one.
        short: a clip shorter than a window is an ``"error"``, is replaced like a damaged one (``"skip"``), or is played in
            a ``"loop"``.
        seed: >= 0.
        cache_bytes: bound on memory for clips kept whole at the output size, shared out between the loader's processes; 0 for
            none. What fits first stays. The cache changes the time of a read, never its result.
        decoder: as :func:`hpdm.decode.read_clip`.
        timeout: seconds for one read.

    Raises:
        FileNotFoundError: no such folder, split file or listed clip.
        ValueError: a folder without videos, a class that the set does not have, a bad number.

    Reading an item raises :class:`ShortClipError` or, when no clip of the set is good, :class:`hpdm.decode.DecodeError`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        frames: int,
        size: int | tuple[int, int],
        stride: int = 1,
        split: Literal["train", "test"] | None = None,
        fold: int = 1,
        split_file: str | os.PathLike[str] | None = None,
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
        if split is not None and split_file is not None:
            raise ValueError("split_file: got both split and split_file, expected one of them")
        self.root = Path(root)
        self.frames, self.stride, self.train, self.short, self.seed = frames, stride, train, short, seed
        self.size = (height, width)
        self.cache_bytes, self.decoder, self.timeout = cache_bytes, decoder, timeout
        if split is not None:
            split_file = _find_split_file(self.root, split, fold)
        self.class_names, self.files = find_videos(self.root, split_file)
        self._infos: dict[int, VideoInfo] = {}
        self._bad: dict[int, str] = {}
        self._cache: dict[int, tuple[Tensor, str]] = {}
        self._cached_bytes = 0

    @property
    def labels(self) -> list[int] | None:
        """The label of each file; ``None`` where the set has no classes."""
        return [file.label for file in self.files] if self.class_names else None

    @property
    def span(self) -> int:
        """Frames of the file that a window spans."""
        return (self.frames - 1) * self.stride + 1

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
        for step in range(len(self)):
            other = (index + step) % len(self)
            if other in self._bad:
                continue
            try:
                return self._read(other, epoch)
            except ShortClipError as error:
                if self.short == "error":
                    raise
                self._skip(other, str(error))
            except (DecodeError, FileNotFoundError) as error:
                self._skip(other, str(error))
        first = next(iter(self._bad.values()))
        raise DecodeError(f"{self.root}: none of the {len(self)} clips can be used; the first: {first}")

    def _skip(self, index: int, reason: str) -> None:
        self._bad[index] = reason
        warnings.warn(f"clip skipped: {reason}", RuntimeWarning, stacklevel=3)

    def _read(self, index: int, epoch: int) -> ClipItem:
        file = self.files[index]
        if index not in self._infos:
            self._infos[index] = probe(file.path, timeout=self.timeout)
        total = self._infos[index].frames
        if total < self.span and self.short != "loop":
            raise ShortClipError(
                f"{file.path}: got {total} frames, expected >= {self.span} for frames={self.frames}, stride={self.stride}"
            )
        last = max(0, total - self.span)
        start = last // 2
        if self.train:
            start = int(np.random.default_rng([self.seed, epoch, index]).integers(last + 1))
        numbers = [(start + i * self.stride) % total for i in range(self.frames)]
        cached = self._cache.get(index) or self._fill_cache(index, total)
        if cached is not None:
            whole, decoder = cached
            window = whole[numbers]
        else:
            clip = read_clip(file.path, numbers, decoder=self.decoder, timeout=self.timeout)
            window, decoder = resize_and_crop(torch.from_numpy(clip.frames), self.size), clip.decoder
        video = window.permute(3, 0, 1, 2).contiguous()
        return {"video": video, "label": file.label, "path": file.path, "start": start, "decoder": decoder}

    def _fill_cache(self, index: int, total: int) -> tuple[Tensor, str] | None:
        worker = get_worker_info()
        share = self.cache_bytes // (worker.num_workers if worker else 1)
        need = total * self.size[0] * self.size[1] * 3
        if self._cached_bytes + need > share:
            return None
        parts, decoder = [], ""
        for first in range(0, total, _CHUNK):
            numbers = range(first, min(first + _CHUNK, total))
            try:
                clip = read_clip(self.files[index].path, numbers, decoder=self.decoder, timeout=self.timeout)
            except DecodeError:
                return None  # damaged somewhere: the window itself may still be good, as without a cache
            decoder = clip.decoder
            parts.append(resize_and_crop(torch.from_numpy(clip.frames), self.size))
        self._cache[index] = torch.cat(parts), decoder
        self._cached_bytes += need
        return self._cache[index]


class ClipSampler(Sampler[list[ClipKey]]):
    """Endless shuffled batches, each a pure function of (seed, step): a run resumes from its step number alone.

    Give it to a ``DataLoader`` as ``batch_sampler``. Every epoch is a fresh permutation and the epochs are strung together, so
    all batches are full and every clip comes equally often.

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


def find_videos(
    root: str | os.PathLike[str], split_file: str | os.PathLike[str] | None = None
) -> tuple[list[str], list[VideoFile]]:
    """Class names (empty for a flat folder) and files of a set; see :class:`VideoDataset` for the layouts.

    Raises:
        FileNotFoundError: no such folder, split file or listed clip.
        ValueError: no videos, videos both beside and inside class folders, a class that the set does not have.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    flat = _videos_in(root)
    folders = {
        folder.name: videos for folder in sorted(root.iterdir()) if folder.is_dir() and (videos := _videos_in(folder))
    }
    if flat and folders:
        raise ValueError(
            f"root: {root} holds videos beside class folders ({', '.join(list(folders)[:3])}), expected one"
        )
    if not flat and not folders:
        raise ValueError(
            f"root: no videos in {root} or the folders in it, expected names ending in {' '.join(sorted(SUFFIXES))}"
        )
    if flat and split_file is not None:
        raise ValueError(f"split_file: {root} has no class folders, which a split needs")
    if flat:
        return [], [VideoFile(str(path), 0) for path in flat]
    lists = [Path(split_file).parent] if split_file is not None else _split_folders(root)
    index = next((path for folder in lists if (path := folder / "classInd.txt").is_file()), None)
    names = _read_class_index(index) if index is not None else list(folders)
    if split_file is not None:
        return names, _read_split(root, Path(split_file), names, folders)
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise ValueError(f"root: class folder {unknown[0]!r} is not in {index}")
    return names, [VideoFile(str(path), names.index(name)) for name, paths in folders.items() for path in paths]


def _videos_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if os.path.splitext(e.name)[1].lower() in SUFFIXES and e.is_file()]
    # Names that start with a dot are files in the making and desktop debris.
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _split_folders(root: Path) -> list[Path]:
    return [root, root / SPLIT_FOLDER, root.parent / SPLIT_FOLDER]


def _find_split_file(root: Path, split: str, fold: int) -> Path:
    name = f"{split}list{fold:02d}.txt"
    for folder in _split_folders(root):
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in _split_folders(root))
    raise FileNotFoundError(f"split: no {name} in {looked}")


def _read_class_index(path: Path) -> list[str]:
    names: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 2 or fields[0] != str(len(names) + 1):
            raise ValueError(f"{path}:{number}: got {line!r}, expected '{len(names) + 1} ClassName'")
        names.append(fields[1])
    return names


def _read_split(root: Path, path: Path, names: list[str], folders: dict[str, list[Path]]) -> list[VideoFile]:
    """Reads lines ``Class/clip.avi 1`` (train) or ``Class/clip.avi`` (test); another video suffix of the file is accepted."""
    if not path.is_file():
        raise FileNotFoundError(f"split_file: {path} is not a file")
    by_stem = {(name, video.stem): video for name, videos in folders.items() for video in videos}
    files = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        listed, *label = line.split()
        name, _, clip = listed.rpartition("/")
        if name not in names:
            raise ValueError(f"{path}:{number}: class {name!r} is not one of the {len(names)} classes of {root}")
        if label and label != [str(names.index(name) + 1)]:
            raise ValueError(
                f"{path}:{number}: got label {' '.join(label)} for {name}, expected {names.index(name) + 1}"
            )
        video = root / listed
        if not video.is_file():
            # Copies of UCF-101 are often transcoded from avi to mp4.
            other = by_stem.get((name, Path(clip).stem))
            if other is None:
                raise FileNotFoundError(f"{path}:{number}: {video} does not exist, under no video suffix")
            video = other
        files.append(VideoFile(str(video), names.index(name)))
    if not files:
        raise ValueError(f"split_file: {path} lists no clips")
    return files


def steps_per_epoch(length: int, batch: int, world: int = 1) -> int:
    """Steps in which ``world`` processes with ``batch`` clips each go once through ``length`` clips, rounded up."""
    return math.ceil(length / (batch * world))
