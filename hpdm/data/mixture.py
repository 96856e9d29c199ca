"""Several sets of clips as one, each with a weight: videos beside images, or a small set beside a large one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from hpdm.data.clips import ClipItem, VideoDataset
from hpdm.data.latent_clips import LatentDataset
from hpdm.data.layout import VideoFile
from hpdm.data.order import ClipKey, MixedOrder

ClipSource = VideoDataset | LatentDataset
"""A set of clips: videos, or latents of them."""


class WeightedRoot(NamedTuple):
    """A folder or a pattern of shards, and its weight in a mixture."""

    root: Path
    weight: float


def parse_root(text: str | os.PathLike[str]) -> WeightedRoot:
    """Splits ``folder:0.5`` into the folder and its weight; without a weight it is 1.

    What exists under the whole name is the folder itself, also where its name ends in a colon and a number.

    Raises:
        ValueError: a weight that is not a finite number > 0.
    """
    whole = os.fspath(text)
    root, colon, suffix = whole.rpartition(":")
    if not colon or not root or os.path.exists(whole):
        return WeightedRoot(Path(whole), 1.0)
    try:
        weight = float(suffix)
    except ValueError:
        return WeightedRoot(Path(whole), 1.0)
    if not 0 < weight < float("inf"):
        raise ValueError(f"data: got weight {suffix} for {root}, expected a finite number > 0")
    return WeightedRoot(Path(root), weight)


class Mixture(Dataset[ClipItem]):
    """Sets of clips of one shape, whose clips are numbered in a row.

    A clip that a set leaves out is replaced by another one of that set, so weights hold whatever is left out.

    Args:
        sets: at least one, with the same frames and size; all of videos, or all of latents.
        weights: of each set, > 0: a set gives its weight over the sum of all weights of the clips of a batch, on
            average, whatever its size.
        labeled: whether labels matter. Then all sets must have the same classes in the same order, or all none.

    Raises:
        ValueError: no sets, not as many weights, a weight out of range, sets of other shapes or other classes.
    """

    def __init__(self, sets: Sequence[ClipSource], weights: Sequence[float], *, labeled: bool = True) -> None:
        if not sets:
            raise ValueError("data: got no sets, expected at least one")
        self.sets, self.weights = list(sets), list(weights)
        self.order(batch=1, seed=0)  # checks the weights
        first = self.sets[0]
        for other in self.sets[1:]:
            shapes = [(of.frames, *of.size) for of in (first, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"data: got clips of {shapes[1]} from {other.root}, expected {shapes[0]} as of the first"
                )
            if labeled and other.class_names != first.class_names:
                raise ValueError(_different_classes(first, other))
        self.class_names = first.class_names if labeled else []
        self.files: list[VideoFile] = [file for part in self.sets for file in part.files]
        self._firsts = [sum(len(part) for part in self.sets[:number]) for number in range(len(self.sets))]

    def order(self, batch: int, seed: int) -> MixedOrder:
        """The order in which training takes clips."""
        return MixedOrder([len(part) for part in self.sets], self.weights, batch, seed)

    def short_clips(self) -> dict[int, int]:
        """As :meth:`hpdm.data.clips.VideoDataset.short_clips`, by the numbers that clips have here."""
        return {
            first + number: frames
            for first, part in zip(self._firsts, self.sets)
            for number, frames in part.short_clips().items()
        }

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | ClipKey) -> ClipItem:
        """As :meth:`hpdm.data.clips.VideoDataset.__getitem__`, of the set that has the clip."""
        clip, epoch = key if isinstance(key, tuple) else (int(key), 0)
        part, clip = self._place(clip)
        return part[ClipKey(clip, epoch)]

    def with_video(self, number: int) -> ClipItem:
        """As :meth:`hpdm.data.clips.VideoDataset.with_video`, of the set that has the clip."""
        part, clip = self._place(number)
        return part.with_video(clip)

    def _place(self, clip: int) -> tuple[ClipSource, int]:
        """The set that has a clip, and its number there."""
        if not -len(self) <= clip < len(self):
            raise IndexError(f"index: got {clip}, expected one of {len(self)} clips")
        clip %= len(self)
        number = max(number for number, first in enumerate(self._firsts) if first <= clip)
        return self.sets[number], clip - self._firsts[number]


def _different_classes(first: ClipSource, other: ClipSource) -> str:
    """The message about two sets whose classes differ: it shows where, since there may be hundreds of classes."""
    if not first.class_names or not other.class_names:
        with_classes, without = (first, other) if first.class_names else (other, first)
        return (
            f"data: got no classes from {without.root} and {len(with_classes.class_names)} from {with_classes.root}; "
            "a class model needs a label for every clip: use the same class folders in both, or train with captions"
        )
    pairs = zip([*first.class_names, "none"], [*other.class_names, "none"])
    label, (expected, got) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    return (
        f"data: class {label} of {other.root} is {got}, expected {expected} as in {first.root}; the sets need the same "
        "class folders, or the same classInd.txt"
    )
