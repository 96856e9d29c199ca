"""The order of clips in training: shuffled anew in every epoch, without state that a checkpoint must save."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpdm.checks import at_least


class ClipKey(NamedTuple):
    """An index into a :class:`~hpdm.data.clips.VideoDataset`: clip ``clip`` with the window of epoch ``epoch``."""

    clip: int
    epoch: int


class ClipOrder:
    """Batches of shuffled clips, each a pure function of (seed, number of the batch), so that a run resumes anywhere.

    Every epoch is a new permutation of the set. A batch may span two epochs, so that all batches are full
    and all clips come equally often.

    Args:
        length: number of clips in the set, >= 1.
        batch: clips of one batch, >= 1.
        seed: >= 0.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, length: int, batch: int, seed: int = 0) -> None:
        self.length, self.batch, self.seed = length, batch, seed
        at_least(self, 1, "length", "batch")
        at_least(self, 0, "seed")
        self._permutation: tuple[int, np.ndarray] | None = None  # the epoch used last, and its order

    def keys(self, number: int) -> list[ClipKey]:
        """The clips of batch ``number``, counted from 0."""
        first = number * self.batch
        return [self._key(first + i) for i in range(self.batch)]

    def _key(self, position: int) -> ClipKey:
        epoch, place = divmod(position, self.length)
        if self._permutation is None or self._permutation[0] != epoch:
            self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.length)
        return ClipKey(int(self._permutation[1][place]), epoch)
