"""Small tensors of the device that the host reads some steps later, when they are there without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Delayed:
    """Numbers of the last steps, copied to the host while the device goes on.

    To read the numbers of the step before the last one waits for no work that is under way: by then the device is busy
    with the last step.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, Tensor, Any]] = deque()  # step, copy, CUDA event

    def put(self, step: int, numbers: Tensor) -> None:
        """Starts the copy of a step's numbers, of one axis."""
        copied = None
        if numbers.device.type == "cuda":
            host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            numbers = host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append((step, numbers, copied))

    def take(self, but: int = 0) -> Iterator[tuple[int, list[float]]]:
        """The steps whose numbers have not been taken, but the last ``but`` of them, and their numbers."""
        while len(self._waiting) > but:
            step, numbers, copied = self._waiting.popleft()
            if copied is not None:
                copied.synchronize()
            yield step, numbers.tolist()
