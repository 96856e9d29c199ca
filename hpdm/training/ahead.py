"""What is random in a step, drawn in a thread while the step before it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class DrawnAhead:
    """Draws of micro-batches, by their numbers. A context manager.

    The noise of a micro-batch takes the CPU tens of milliseconds, as long as a good part of a step takes a GPU.

    Args:
        draw: makes the draws of the micro-batch of a number, from that number alone.
    """

    def __init__(self, draw: Callable[[int], Any]) -> None:
        self._draw = draw
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hpdm-draws")
        self._drawn: dict[int, Future[Any]] = {}

    def __enter__(self) -> DrawnAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def begin(self, numbers: Sequence[int]) -> None:
        """Begins the draws of ``numbers``, unless they are begun."""
        for number in numbers:
            if number not in self._drawn:
                self._drawn[number] = self._pool.submit(self._draw, number)

    def take(self, numbers: Sequence[int], following: Sequence[int] = ()) -> list[Any]:
        """The draws of ``numbers``, once they are made; those ``following`` are begun. Raises what drawing raised."""
        self.begin([*numbers, *following])
        return [self._drawn.pop(number).result() for number in numbers]
