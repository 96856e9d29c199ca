"""Stopping between steps: Ctrl-C, or the SIGTERM of a cluster's scheduler, is a wish, not an accident."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

logger = logging.getLogger(__name__)


class Stop:
    """Within it, the first SIGINT or SIGTERM sets ``asked``; a second one interrupts at once.

    Python delivers signals to the main thread alone; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("%s: stopping after this step, once the checkpoint is written", signal.Signals(number).name)
