"""Graceful shutdown: on SIGINT or SIGTERM, finish the step, save a checkpoint, exit."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

logger = logging.getLogger(__name__)


class Stop:
    """Within the block, the first SIGINT (Ctrl-C) or SIGTERM (a cluster's scheduler) sets ``requested``.

    A second signal raises KeyboardInterrupt at once. Python delivers signals only to the main thread; in any other
    thread the block changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Stop:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            self.previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main_thread:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("%s: stopping after this step, once the checkpoint is written", signal.Signals(number).name)
