"""Memory that two processes share, through which frames pass: each is written once, and read where it lies."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence

import numpy as np

_BYTES = 4 << 20  # of small frames at a time, so that both processes seldom wait for each other
_MOST_SLOTS = 16


class Ring:
    """Slots for a few frames of one shape, taken in turn.

    Args:
        file: descriptor of a file that both processes have open; it grows as frames need.
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self.memory: mmap.mmap | None = None

    def slots(self, shape: Sequence[int]) -> int:
        """How many frames of that shape there is room for: two of the largest, more of small ones."""
        return max(2, min(_MOST_SLOTS, _BYTES // max(1, math.prod(shape))))

    def slot(self, number: int, shape: Sequence[int]) -> np.ndarray:
        """The place of frame ``number``, uint8 of that shape; frames ``slots(shape)`` apart have the same place."""
        size, slots = math.prod(shape), self.slots(shape)
        if self.memory is None or len(self.memory) < size * slots:
            if os.fstat(self.file).st_size < size * slots:
                os.ftruncate(self.file, size * slots)
            self.memory = mmap.mmap(self.file, size * slots)
        return np.frombuffer(self.memory, np.uint8, size, number % slots * size).reshape(shape)
