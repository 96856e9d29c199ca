"""Graceful shutdown: on a signal that asks for the end, finish the step, save a checkpoint, exit."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a scheduler's request, a terminal that was closed, and what Slurm's ``--signal`` is mostly set to."""
REPEATS = 5.0
"""Seconds after the first signal in which others count as the same: a launcher forwards its own to processes that the
scheduler has signaled already."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the work, after what was done is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status by the convention of shells: 143 after SIGTERM."""
        return 128 + self.number


class Stop:
    """Within the block, the first of :data:`SIGNALS` sets ``requested`` and ends what is :meth:`interruptible`.

    A signal that comes more than :data:`REPEATS` seconds later raises :class:`Interrupted` at once, without a
    checkpoint. One that comes earlier is ignored, even after the block: the process may be on its way out. Python
    delivers signals only to the main thread; in any other thread the block changes nothing.
    """

    def __init__(self) -> None:
        self.requested = 0
        """Number of the signal; 0 for none."""
        self._first = 0.0
        self._interruptible = self._left = False

    def __enter__(self) -> Stop:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            self.previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        if self.in_main_thread and not self.requested:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextmanager
    def interruptible(self, on: bool = True) -> Iterator[None]:
        """Within the block a signal raises :class:`Interrupted` at once: nothing is lost that is not done again."""
        if on and self.requested:
            raise Interrupted(self.requested)
        self._interruptible = on
        try:
            yield
        finally:
            self._interruptible = False

    def _request(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            late = time.monotonic() - self._first > REPEATS
            if late and self._left:
                self._restore()
                signal.raise_signal(number)
            elif late:
                logger.warning("%s again: ending without a checkpoint", name)
                raise Interrupted(number)
            return
        self.requested, self._first = number, time.monotonic()
        logger.warning("%s: stopping after this step, once a checkpoint is written", name)
        if self._interruptible:
            raise Interrupted(number)
