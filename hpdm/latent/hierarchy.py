"""The order of hierarchical generation: which latents are predicted, and which are put between them, and when.

Hierarchical generation of Latent Video Diffusion Models (He et al. 2022, section 3.4): sparse latents, each ``spacing``
after the one before, are predicted window by window. Windows of consecutive latents then know the sparse ones among
their own, the first and the last always. They depend on sparse latents alone, so those that are ready can be sampled at
once, in any order and anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Step(NamedTuple):
    """What is sampled next."""

    predictions: range
    """Numbers of the windows of sparse latents, one after another; empty only if there is nothing to wait for."""
    windows: range
    """Numbers of the windows of consecutive latents, at least one, which are then ready."""


@dataclass(frozen=True)
class Hierarchy:
    """The sizes of hierarchical generation, and its steps.

    Raises:
        ValueError: sizes that do not fit; the message names the field.
    """

    window: int
    """Sparse latents of a prediction."""
    known: int
    """Those that it knows of the prediction before."""
    spacing: int
    """Latents from a sparse one to the next."""
    pairs: int = 1
    """Pairs of neighboring sparse latents in a window of consecutive ones."""

    def __post_init__(self) -> None:
        if not 1 <= self.known < self.window:
            raise ValueError(
                f"known: got {self.known}, expected 1 to {self.window - 1}: a window has {self.window} sparse latents, "
                "some to know and some to sample"
            )
        if self.spacing < 2:
            raise ValueError(f"spacing: got {self.spacing}, expected at least 2, something to sample between")
        if not 1 <= self.pairs < self.window:
            raise ValueError(f"pairs: got {self.pairs}, expected 1 to {self.window - 1}")

    @property
    def stride(self) -> int:
        """Latents from the start of a window of consecutive ones to that of the next, which shares one with it."""
        return self.pairs * self.spacing

    def count(self, latents: int) -> int:
        """Windows of consecutive latents that so many latents take, at least one."""
        return max(1, math.ceil((latents - 1) / self.stride))

    def predictions(self, latents: int) -> int:
        """Windows of sparse latents that so many latents take, the first of which knows nothing."""
        sparse = self.count(latents) * self.pairs + 1
        return 1 + max(0, math.ceil((sparse - self.window) / (self.window - self.known)))

    def sparse(self, predictions: int) -> int:
        """Sparse latents after so many predictions."""
        return self.window + (predictions - 1) * (self.window - self.known) if predictions else 0

    def steps(self, latents: int) -> Iterator[Step]:
        """The steps of so many latents: a prediction, and at once the windows that it makes ready.

        Those of fewer latents are the same, but that the last one may end early.
        """
        count, done, predicted = self.count(latents), 0, 0
        while done < count:
            first = predicted
            while (ready := (self.sparse(predicted) - 1) // self.pairs) <= done:
                predicted += 1
            yield Step(range(first, predicted), range(done, min(ready, count)))
            done = min(ready, count)
