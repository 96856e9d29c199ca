"""Sets of videos as uint8 clips of one shape, out of folders or tar shards.

Which frames an item shows is a pure function of (seed, epoch, number of the clip): it depends neither on the number
of processes that read nor on what was read before, so a resumed run sees the same clips as an uninterrupted one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hpdm.checks import at_least, check_choice
from hpdm.data import decoder_process
from hpdm.data.cache import ClipCache
from hpdm.data.captions import check_captions
from hpdm.data.decode import TIMEOUT_S, DecodeError, Decoder, VideoInfo, probe, read_clip
from hpdm.data.finding import find_clips as find_clips
from hpdm.data.finding import survey
from hpdm.data.layout import Split
from hpdm.data.order import ClipKey
from hpdm.data.resize import resizing
from hpdm.data.suffixes import is_image
from hpdm.data.windows import Window

log = logging.getLogger(__name__)

Short = Literal["error", "skip", "loop"]
"""What to do with a clip that is shorter than a window; see :class:`VideoDataset`."""
# A file may be damaged, or be deleted or replaced while a run reads it.
_READ_ERRORS = (DecodeError, FileNotFoundError, IndexError)


class ClipItem(TypedDict):
    """One item of :class:`VideoDataset`, or of :class:`hpdm.data.latent_clips.LatentDataset`."""

    video: NotRequired[Tensor]  # uint8 [3, F, H, W]
    latents: NotRequired[Tensor]  # float16 [z, T, h, w], in place of the video
    label: int  # 0 where the set has no classes
    caption: str  # "" where captions were not asked for
    path: str
    start: int  # number of the first frame in the file; of latents, of the first latent of the clip
    decoder: NotRequired[str]  # "decord" or "pyav"


class ShortClipError(ValueError):
    """A clip with fewer frames than a window needs."""


class VideoDataset(Dataset[ClipItem]):
    """Clips of one shape out of a folder of videos or out of tar shards.

    Four layouts, told apart by what the folder holds:

    - class folders, ``root/Class/clip.avi``, with clips at any depth below them: labels follow ``classInd.txt`` where
      there is one, else the sorted names;
    - the same with UCF-101's official split files (``trainlist01.txt``, ``testlist01.txt``, ``classInd.txt``, in
      ``root``, in ``root/ucfTrainTestlist`` or beside ``root``), when ``split`` or ``split_file`` is given; a listed
      clip may have another video suffix on disk, as transcoded copies do, and another case;
    - a flat folder of videos: no classes, every label is 0 and ``class_names`` is empty;
    - tar shards in webdataset's layout (:mod:`hpdm.data.shards`): ``root`` is their folder, one ``.tar``, or a pattern
      such as ``data/shard-{000000..000009}.tar`` or ``data/*.tar``. They have no ``split``.

    A set without any video may hold images (:mod:`hpdm.data.suffixes`). An image is a clip of one frame, and its window
    is that frame, repeated; ``stride``, ``fps`` and ``short`` do not apply to it.

    What a set holds besides is left out, and ``found`` says what and why (:class:`hpdm.data.found.Found`).

    A clip or window that turns out damaged is replaced by the next good clip in the order of files, and the log names
    it. Damage that a codec conceals is not noticed here: ``hpdm data inspect --full`` finds it. A clip that does not
    answer in time is not damaged, and is never replaced: reading it fails with
    :class:`hpdm.data.decode.StalledError`.

    Args:
        root: the folder, or a pattern of shards.
        frames: frames of a window, >= 1.
        size: height and width of the output, or one int for both; see :func:`~hpdm.data.resize.resize_and_crop`.
        stride: step between frames of a window, >= 1; a window spans ``(frames - 1) * stride + 1`` frames.
        fps: frames per second, > 0, to which clips are resampled before ``stride`` counts: each frame of a window is
            the clip's nearest in time, by the frames' own times. A clip without times and rate is skipped like a
            damaged one. ``None`` takes frames as they are stored; where clips then differ in rate, a warning says so.
        split: ``"train"`` or ``"test"`` of the official split, ``None`` for every clip.
        fold: which official split, 1 to 3.
        split_file: a list of clips in the official format, instead of ``split``.
        captions: read a caption for every clip, from ``captions.jsonl`` in ``root`` (lines ``{"file":
            "relative/path.mp4", "caption": "..."}``) or from a text file of the clip's name beside it; in shards, from
            ``key.txt`` or ``key.json``.
        train: ``True`` draws the window at random from (seed, epoch, number of the clip); ``False`` takes the middle
            one.
        short: a clip shorter than a window is replaced like a damaged one (``"skip"``; :meth:`short_clips` counts
            them), is an ``"error"``, or is played in a ``"loop"``.
        seed: >= 0.
        cache_bytes: bound on the memory for whole clips at the output size and for the processes that decode them,
            shared between the loader's processes; 0 for no cache.
        decoder: as :func:`hpdm.data.decode.read_clip`.
        timeout: seconds without progress, for one read.

    Raises:
        FileNotFoundError: no such folder, shard, split file or listed clip.
        ValueError: a folder without videos and images, a damaged shard, a class that the set does not have, clips
            without a caption, a bad number.

    Reading an item raises :class:`ShortClipError`, :class:`hpdm.data.decode.StalledError` or, when no clip of the set
    is good, :class:`hpdm.data.decode.DecodeError`.
    """

    # The parameters are the options of the class, documented above; most have defaults.
    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        frames: int,
        size: int | tuple[int, int],
        stride: int = 1,
        fps: float | None = None,
        split: Split | None = None,
        fold: int = 1,
        split_file: str | os.PathLike[str] | None = None,
        captions: bool = False,
        train: bool = True,
        short: Short = "skip",
        seed: int = 0,
        cache_bytes: int = 0,
        decoder: Decoder = "auto",
        timeout: float = TIMEOUT_S,
    ) -> None:
        self.root, self.split, self.fold = Path(root), split, fold
        self.frames, self.stride, self.fps = frames, stride, fps
        self.size = (size, size) if isinstance(size, int) else size
        self.train, self.short, self.seed = train, short, seed
        self.cache_bytes, self.decoder, self.timeout = cache_bytes, decoder, timeout
        at_least(self, 1, "frames", "stride", "fold")
        at_least(self, 0, "seed", "cache_bytes")
        if min(self.size) < 1:
            raise ValueError(f"size: got {min(self.size)}, expected at least 1")
        if fps is not None and not 0 < fps < float("inf"):
            raise ValueError(f"fps: got {fps}, expected > 0")
        if split is not None:
            check_choice("split", split, Split)
        check_choice("short", short, Short)
        check_choice("decoder", decoder, Decoder)
        if split is not None and split_file is not None:
            raise ValueError("split_file: got both split and split_file, expected one of them")
        self.found = survey(root, split=split, fold=fold, split_file=split_file, captions=captions)
        self.class_names, self.files = self.found.class_names, self.found.files
        if captions:
            check_captions(root, self.files)
        self.window = Window(frames, stride, fps)
        self._infos: dict[int, VideoInfo] = {}
        self._unusable: dict[int, str] = {}  # why, for clips of which no window can be used
        self._warned: set[int] = set()
        # Numbers of frames of the clips that were found too short, else 0; shared with the loader's processes.
        self._short = torch.zeros(len(self.files), dtype=torch.int32).share_memory_()
        self._short_told = False
        self._first_info: VideoInfo | None = None  # the first clip with a frame rate: the others are compared with it
        self._rates_differ = False
        self._doubts: set[str] = set()  # reasons against decord that the log has told
        self._cache = ClipCache(cache_bytes, self.size)
        self._uncacheable: set[int] = set()  # partly damaged, so that only some windows can be read

    @property
    def labels(self) -> list[int] | None:
        """The label of each file; ``None`` where the set has no classes."""
        return [file.label for file in self.files] if self.class_names else None

    def offsets(self, fps: float) -> np.ndarray:
        """The frames of a window, from its first, in a clip of evenly spaced frames, ``fps`` a second: int64 [F]."""
        return self.window.offsets(fps)

    def __len__(self) -> int:
        return len(self.files)

    def short_clips(self) -> dict[int, int]:
        """The clips that were left out so far because they are shorter than a window: their numbers of frames.

        A clip is examined when it is first asked for, by this process or one of the loader's: what this returns grows
        in the first epoch.
        """
        numbers = self._short.nonzero()[:, 0].tolist()
        return dict(zip(numbers, self._short[numbers].tolist()))

    def __getitem__(self, key: int | ClipKey) -> ClipItem:
        """The window that a :class:`~hpdm.data.order.ClipKey` names, or the window of clip ``key`` in epoch 0.

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
            candidate = (index + step) % len(self)
            reason = self._unusable.get(candidate) or self._examine(candidate)
            if reason is None:
                try:
                    return self._read(candidate, epoch)
                except _READ_ERRORS as error:
                    # Not kept in _unusable: an item must not depend on which windows of a clip were read before.
                    reason = str(error)
            self._tell(candidate, reason)
            reasons.append(reason)
        raise DecodeError(f"{self.root}: none of the {len(self)} clips can be used; the first: {reasons[0]}")

    def with_video(self, number: int) -> ClipItem:
        """The window of a clip in epoch 0, with its pixels; raises as :meth:`__getitem__`."""
        return self[number]

    def _tell(self, index: int, reason: str) -> None:
        """Logs that a clip is left out, once: each damaged clip, but of the short ones the first alone."""
        if index in self._warned:
            return
        self._warned.add(index)
        if self._short[index]:
            if self._short_told or not _is_first_reader():
                return
            self._short_told = True
            reason += "; other short clips are not named"
        log.warning("clip skipped: %s", reason)

    def _examine(self, index: int) -> str | None:
        """Probes a clip, once; returns why no window of it can be used, ``None`` if one can."""
        path, source = self.files[index].path, self.files[index].source
        if index not in self._infos:
            try:
                self._infos[index] = probe(source, timeout=self.timeout)
            except _READ_ERRORS as error:
                self._unusable[index] = str(error)
                return self._unusable[index]
            if self.fps is None and not is_image(path):
                self._compare_rates(self._infos[index])
        if is_image(path):
            return None
        info = self._infos[index]
        if self.fps is not None and not info.fps:
            self._unusable[index] = f"{path}: nothing tells its frame rate, which fps={self.fps:g} needs"
            return self._unusable[index]
        if self.window.starts(info) or self.short == "loop":
            return None
        reason = f"{path}: {self.window.too_short(info)}"
        if self.short == "error":
            raise ShortClipError(reason)
        self._unusable[index] = reason
        self._short[index] = info.frames
        return reason

    def _compare_rates(self, info: VideoInfo) -> None:
        """Warns, once, when a clip's frame rate differs by more than 1 % from the first clip's."""
        if self._rates_differ or not info.fps or not _is_first_reader():
            return
        self._first_info = self._first_info or info
        if abs(info.fps / self._first_info.fps - 1) > 0.01:  # 29.97 and 30 count as equal
            self._rates_differ = True
            log.warning(
                "%s: clips differ in frame rate (%s: %g, %s: %g frames per second): a window spans the same frames of "
                "each, not the same time; pass fps to resample them to one rate",
                self.root, info.path, info.fps, self._first_info.path, self._first_info.fps,
            )  # fmt: skip

    def _read(self, index: int, epoch: int) -> ClipItem:
        """Draws the window of ``epoch`` and reads it, out of the cache or from the file."""
        file = self.files[index]
        start, numbers = self._draw_window(index, epoch)
        cached = self._cached(index)
        if cached is not None:
            whole, decoder = cached
            window = whole[numbers]
        else:
            window, decoder = self._decode(index, numbers)
        return {
            "video": window.permute(3, 0, 1, 2).contiguous(),  # [3, F, H, W]
            "label": file.label,
            "caption": file.caption,
            "path": file.path,
            "start": start,
            "decoder": decoder,
        }

    def _draw_window(self, index: int, epoch: int) -> tuple[int, list[int]]:
        """The first frame of the window of ``epoch``, and the numbers of all its frames."""
        if is_image(self.files[index].path):
            return 0, [0] * self.frames
        info = self._infos[index]
        starts = max(1, self.window.starts(info))
        start = (starts - 1) // 2
        if self.train:
            start = int(np.random.default_rng([self.seed, epoch, index]).integers(starts))
        return start, self.window.numbers(info, start)

    def _decode(self, index: int, numbers: Sequence[int]) -> tuple[Tensor, str]:
        """Frames of a clip at the output size, uint8 ``[F, H, W, 3]``, and their decoder."""
        source, transform = self.files[index].source, resizing(self.size, self._infos[index].pixel_aspect)
        clip = read_clip(source, numbers, decoder=self.decoder, timeout=self.timeout, transform=transform)
        if clip.doubt and clip.doubt not in self._doubts and _is_first_reader():
            self._doubts.add(clip.doubt)
            log.info("%s: PyAV reads clips with %s; the first is %s", self.root, clip.doubt, source)
        return torch.from_numpy(clip.frames), clip.decoder

    def _cached(self, index: int) -> tuple[Tensor, str] | None:
        """The clip from the cache, into which it is read first if it fits; else ``None``."""
        if (cached := self._cache.get(index)) is not None:
            return cached
        frames = self._infos[index].frames
        if index in self._uncacheable or not self._cache.has_room(frames, decoder_process.process.memory()):
            return None
        try:
            self._cache.add(index, *self._decode(index, range(frames)))
        except _READ_ERRORS:
            self._uncacheable.add(index)
        return self._cache.get(index)


def _is_first_reader() -> bool:
    """Whether this process may speak of the whole set: of the loader's workers, which all see all of it, the first."""
    worker = get_worker_info()
    return worker is None or worker.id == 0
