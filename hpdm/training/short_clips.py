"""Tells in the log how many clips a run leaves out because they are shorter than a window."""

from __future__ import annotations

import logging
import time

from hpdm import distributed
from hpdm.data.mixture import Mixture

logger = logging.getLogger(__name__)

PERIOD_S = 60.0


class ShortClips:
    """The running count of a run's short clips over all ranks. Clips are examined when they are first drawn."""

    def __init__(self, clips: Mixture) -> None:
        self.clips = clips
        self.frames: dict[int, int] = {}  # of each short clip, by its number
        self._told = 0  # the count in the last line
        self._next_time = time.monotonic()

    def report(self, *, last: bool = False) -> None:
        """Writes a line if the count has changed, at most one per minute except for the ``last``. A collective."""
        new = {number: frames for number, frames in self.clips.short_clips().items() if number not in self.frames}
        for found in distributed.gather({distributed.rank(): new}):
            self.frames |= found
        count = len(self.frames)
        if count == self._told or not distributed.is_first() or (time.monotonic() < self._next_time and not last):
            return
        self._told, self._next_time = count, time.monotonic() + PERIOD_S
        first = min(self.frames)
        logger.info(
            "%d of %d clips have been left out so far, as shorter than a window; the first is %s (%d frames)",
            count, len(self.clips), self.clips.files[first].path, self.frames[first],
        )  # fmt: skip
