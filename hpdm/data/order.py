"""The order of clips in training: shuffled anew in every epoch, without state that a checkpoint must save."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from hpdm.checks import at_least


class ClipKey(NamedTuple):
    """An index into a set of clips: clip ``clip`` with the window of epoch ``epoch``.

    In a :class:`~hpdm.data.mixture.Mixture` the clips of all sets are numbered in a row, and epochs are those of the
    clip's own set.
    """

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
        number: number of the set in a mixture, >= 0; sets of different numbers are shuffled independently.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, length: int, batch: int, seed: int = 0, number: int = 0) -> None:
        self.length, self.batch, self.seed, self.number = length, batch, seed, number
        at_least(self, 1, "length", "batch")
        at_least(self, 0, "seed", "number")
        self._permutation: tuple[int, np.ndarray] | None = None  # the epoch used last, and its order

    def keys(self, number: int) -> list[ClipKey]:
        """The clips of batch ``number``, counted from 0."""
        first = number * self.batch
        return [self.key(first + i) for i in range(self.batch)]

    def key(self, position: int) -> ClipKey:
        """The clip at a position of the order, counted from 0 over all epochs."""
        epoch, place = divmod(position, self.length)
        if self._permutation is None or self._permutation[0] != epoch:
            # Set 0 has no number in its seed, so that runs on one set keep the order that they always had.
            entropy = [self.seed, epoch, *([self.number] if self.number else [])]
            self._permutation = epoch, np.random.default_rng(entropy).permutation(self.length)
        return ClipKey(int(self._permutation[1][place]), epoch)


class MixedOrder:
    """Batches out of several sets, in fixed shares and whatever the sets' sizes, each a pure function as in
    :class:`ClipOrder`.

    Each set is shuffled by epochs of its own, so that every clip of a set comes once before any comes twice. Which set
    a position takes from is not random: the sets are split off one after another, the heaviest first, and of ``m``
    positions that are left a set with the share ``r`` of what is left takes ``floor(m r + 1/2)``. So after any number
    of positions the number of clips of each set is right to within half a clip for two sets, one clip for three, and
    ``(1 + H) / 2`` clips for ``K`` sets, where ``H = 1 + 1/2 + ... + 1/(K-1)``.

    Args:
        lengths: number of clips of each set, >= 1.
        weights: of each set, > 0; a set's share is its weight over the sum of all.
        batch: clips of one batch, >= 1.
        seed: >= 0.

    Raises:
        ValueError: a number out of range, or not as many weights as sets.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], batch: int, seed: int = 0) -> None:
        if len(weights) != len(lengths):
            raise ValueError(f"weights: got {len(weights)}, expected one for each of {len(lengths)} sets")
        wrong = next((weight for weight in weights if not 0 < weight < float("inf")), None)
        if wrong is not None:
            raise ValueError(f"weights: got {wrong}, expected finite numbers > 0")
        self.orders = [ClipOrder(length, batch, seed, number) for number, length in enumerate(lengths)]
        self.firsts = [sum(lengths[:number]) for number in range(len(lengths))]  # number of each set's first clip
        self.batch = batch
        # As decimal fractions: exact, so that counts are right after any number of clips.
        left = [(number, Fraction(str(weight))) for number, weight in enumerate(weights)]
        left.sort(key=lambda item: -item[1])  # stable: of equal weights the first set comes first
        parts = [(n, weight / sum(w for _, w in left[i:])) for i, (n, weight) in enumerate(left)]
        self._parts = [(n, part.numerator, part.denominator) for n, part in parts]  # integers are faster

    def keys(self, number: int) -> list[ClipKey]:
        """The clips of batch ``number``, counted from 0."""
        first, keys = number * self.batch, []
        before = self.counts(first)
        for position in range(first, first + self.batch):
            after = self.counts(position + 1)
            taken = next(place for place, count in enumerate(after) if count > before[place])
            clip, epoch = self.orders[taken].key(before[taken])
            keys.append(ClipKey(self.firsts[taken] + clip, epoch))
            before = after
        return keys

    def counts(self, positions: int) -> list[int]:
        """How many of the first ``positions`` positions take from each set."""
        counts, left = [0] * len(self.orders), positions
        for number, numerator, denominator in self._parts:
            # floor(left * numerator / denominator + 1/2), exactly
            counts[number] = (2 * left * numerator + denominator) // (2 * denominator)
            left -= counts[number]
        return counts
