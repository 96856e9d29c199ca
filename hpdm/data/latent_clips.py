"""Sets of clips that were encoded ahead: windows of latents in place of windows of frames.

Labels, captions, the order of clips and which clips are too short are those of the videos, and so is the rule that a
window is a pure function of (seed, epoch, number of the clip). Windows begin at a latent, though, and not at any frame.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from torch.utils.data import Dataset

from hpdm.data.clips import ClipItem, ShortClipError, VideoDataset
from hpdm.data.latent_store import LatentStore, clip_keys, identity_of
from hpdm.data.order import ClipKey
from hpdm.data.suffixes import is_image


class LatentDataset(Dataset[ClipItem]):
    """The latents of a set of videos, in windows of as many latents as a window of its frames has.

    A clip that is too short, or that could not be read when it was encoded, is replaced by the next good one, as in the
    set of videos. The last latent of a clip whose length is no multiple of the frames per latent is not used.

    Args:
        clips: the videos. They are not opened, but by :meth:`with_video`.
        store: their latents. It may have more clips than these, as when it is of all clips and these are a split.

    Raises:
        OSError: a video is gone.
        ShortClipError: a clip is shorter than a window, under ``short="error"``.
        ValueError: latents of other clips, of another size, stride or frame rate, or not of all clips; a clip of which
            the store has several with the same name and size; no clip is long enough; or ``short="loop"``.
    """

    def __init__(self, clips: VideoDataset, store: LatentStore) -> None:
        self.clips, self.store = clips, store
        self.root, self.found, self.files, self.class_names = clips.root, clips.found, clips.files, clips.class_names
        self.frames, self.size = clips.frames, clips.size
        if clips.short == "loop":
            raise ValueError(
                "short: got 'loop' with latents, expected 'skip' or 'error': where a video starts again, its latents "
                "are not those of its start"
            )
        info, folder = store.info, store.folder
        for name in ("size", "stride", "fps"):
            got, expected = getattr(info, name), getattr(clips, name)
            if got != expected:
                raise ValueError(f"latents: {folder} has latents of {name} {got}, expected {expected}")
        if clips.frames % info.factors[0]:
            raise ValueError(f"latents: got {clips.frames} frames, expected a multiple of {info.factors[0]}")
        self.window = clips.frames // info.factors[0]
        """Latents along time of a window."""
        self._entries = self._find()  # places in the store
        self._still = np.array([is_image(file.path) for file in self.files])
        frames = store.frames[self._entries]
        self._whole = frames // info.factors[0]  # latents that stand for frames of the clip alone
        good = np.where(self._still, frames > 0, self._whole >= self.window)
        self._short = {int(i): int(frames[i]) for i in np.flatnonzero(~good & (frames > 0))}
        first = next(iter(self._short), None)
        if first is not None and clips.short == "error":
            raise ShortClipError(
                f"{self.files[first].path}: got {self._short[first]} frames, expected >= {clips.frames} (frames="
                f"{clips.frames}, stride={clips.stride}, fps={clips.fps})"
            )
        if not good.any():
            raise ValueError(
                f"latents: {folder} has no clip of {clips.frames} frames (stride={clips.stride}), expected some"
            )
        # For each clip itself, or the next good one; after the last one the first.
        places = np.flatnonzero(good)
        self._used = places[np.searchsorted(places, np.arange(len(self.files))) % len(places)]

    def __len__(self) -> int:
        return len(self.files)

    def short_clips(self) -> dict[int, int]:
        """The clips that are left out because they are shorter than a window: their numbers of frames."""
        return self._short

    def with_video(self, number: int) -> ClipItem:
        """The window of a clip in epoch 0, with its pixels; raises as :class:`~hpdm.data.clips.VideoDataset`."""
        return self.clips[number]

    def __getitem__(self, key: int | ClipKey) -> ClipItem:
        """The window that a :class:`~hpdm.data.order.ClipKey` names, or the window of clip ``key`` in epoch 0.

        Raises:
            IndexError: outside of the set.
        """
        index, epoch = key if isinstance(key, tuple) else (int(key), 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: got {index}, expected one of {len(self)} clips")
        index = int(self._used[index % len(self)])
        start = self._start(index, epoch)
        still = bool(self._still[index])
        rows = self.store.rows(int(self._entries[index]), start, 1 if still else self.window)
        file = self.files[index]
        return {
            # Of an image, whose latents are all the same, the store has one.
            "latents": rows.expand(self.window, -1, -1, -1).transpose(0, 1).contiguous(),  # [z, T, h, w]
            "label": file.label,
            "caption": file.caption,
            "path": file.path,
            "start": start,
        }

    def _start(self, index: int, epoch: int) -> int:
        """The first latent of the window of ``epoch``."""
        if self._still[index]:
            return 0
        starts = int(self._whole[index]) - self.window + 1
        if not self.clips.train:
            return (starts - 1) // 2
        return int(np.random.default_rng([self.clips.seed, epoch, index]).integers(starts))

    def _find(self) -> np.ndarray:
        """The place of every clip in the store, int64 ``[n]``."""
        store, keys = self.store, clip_keys(self.clips)
        if (len(keys), identity_of(keys)) == (store.info.clips, store.info.identity):
            lacking = len(keys) - len(store)
            if lacking:
                raise ValueError(
                    f"latents: {store.folder} lacks {lacking} of {len(keys)} clips; run `hpdm data encode` again, "
                    "which goes on where it stopped"
                )
            return np.arange(len(keys))
        stored = [row.tobytes() for row in store.keys]
        places = dict(zip(stored, range(len(stored))))
        unknown = [number for number, key in enumerate(keys) if key not in places]
        if unknown:
            raise ValueError(
                f"latents: {store.folder} lacks {len(unknown)} of the {len(keys)} clips of {self.root}, the first is "
                f"{self.files[unknown[0]].path}; expected latents of these clips, from `hpdm data encode --data "
                f"{self.root}`"
            )
        counts = Counter(stored)
        several = next((number for number, key in enumerate(keys) if counts[key] > 1), None)
        if several is not None:
            raise ValueError(
                f"latents: {store.folder} has {counts[keys[several]]} clips with the name and size of "
                f"{self.files[several].path}; expected latents of exactly the clips of {self.root}"
            )
        return np.array([places[key] for key in keys])
