"""Level 0 of a long video, which the levels above follow: how it goes on from window to window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hpdm.frames import Known
from hpdm.long_video import LongOptions, State
from hpdm.patch.sampler import Sampler
from hpdm.windows import Window, Windows


class Storyline:
    """Level 0 of B long videos, window by window: each one knows the last frames of the one before (autoregressive).

    Args:
        sampler: of single windows.
        windows: how they follow each other.
        seeds: one per video.
        conditions: labels, texts and masks of the videos.
    """

    def __init__(self, sampler: Sampler, windows: Windows, seeds: Sequence[int], conditions: Mapping[str, Any]) -> None:
        self.sampler, self.windows, self.seeds, self.conditions = sampler, windows, seeds, conditions

    def window(self, window: Window, known: Known | None) -> list[Tensor]:
        """Level 0 of the next window, ``[B, C, f, h, w]``; an empty list: it is sampled as the levels above are."""
        return []

    def finished(self, window: Window, video: Tensor) -> None:
        """Takes note of level 0 of a window."""

    def state(self) -> State:
        """What the storyline needs to go on, besides the last window."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`state` returned."""


def storyline(
    sampler: Sampler, windows: Windows, long: LongOptions, seeds: Sequence[int], conditions: Mapping[str, Any]
) -> Storyline:
    """The storyline of a scheme."""
    return Storyline(sampler, windows, seeds, conditions)
