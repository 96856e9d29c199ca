"""What is measured of a model at the end of its training, on training clips, and stored with its weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hpdm import distributed
from hpdm.data.mixture import Mixture
from hpdm.system import System
from hpdm.text import EmbeddingStore
from hpdm.training.batches import collate
from hpdm.training.ema import EMA
from hpdm.training.stored import buffers_of

logger = logging.getLogger(__name__)

MOST_CLIPS = 1024
"""Clips that are measured at most, spread evenly over the set."""


class Measuring:
    """The persistent buffers of a model and of its averages.

    Args:
        system: kind of the model.
        config: the model's.
        clips: the training clips.
        embeddings: of their captions, for a model with text.
        batch: clips at a time.
        built: the model as it was built, with nothing measured.
    """

    def __init__(
        self, system: System, config: Any, clips: Mixture, embeddings: EmbeddingStore | None, batch: int,
        built: nn.Module,
    ) -> None:  # fmt: skip
        self.system, self.config, self.clips, self.embeddings, self.batch = system, config, clips, embeddings, batch
        # Of a model without anything to measure, buffers are something else.
        measured = {} if system.is_measured(built) else buffers_of(built)
        self.initial = {name: b.detach().clone() for name, b in measured.items()}

    @torch.no_grad()
    def forget(self, model: nn.Module, ema: EMA) -> None:
        """Sets all buffers to what they were before anything was measured, as the weights will change."""
        for buffers in (buffers_of(model), *ema.buffers):
            for name, value in self.initial.items():
                buffers[name].copy_(value)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, ema: EMA, with_weights: Mapping[int | None, AbstractContextManager[nn.Module]],
        device: torch.device,
    ) -> bool:  # fmt: skip
        """Measures the model and its averages, unless they are measured. A collective.

        Args:
            model: as it is trained.
            ema: its averages.
            with_weights: for the number of every average, and for ``None``, a context of a model in eval mode, whole on
                this rank, with that average's weights, or with the last ones.
            device: this rank's.

        Returns:
            Whether anything was measured.
        """
        if self.system.is_measured(model):
            return False
        if distributed.is_first():
            logger.info("measuring the model on %d training clips", min(MOST_CLIPS, len(self.clips)))
        found: dict[int | None, dict[str, Tensor]] = {}
        try:
            for number, context in with_weights.items():
                with context as whole:
                    self.system.measure(whole, self._batches(device))
                    found[number] = {name: b.clone() for name, b in buffers_of(whole).items()}
        finally:
            # All or nothing: a signal may end this, and the model itself was measured first.
            self.forget(model, ema)
        for number, values in found.items():
            for name, b in (buffers_of(model) if number is None else ema.buffers[number]).items():
                b.copy_(values[name])
        return True

    def _batches(self, device: torch.device) -> Iterator[dict[str, Tensor]]:
        """This rank's clips: the first windows of clips spread evenly over the set."""
        count = min(MOST_CLIPS, len(self.clips))
        own = distributed.shard([i * len(self.clips) // count for i in range(count)])
        for first in range(0, len(own), self.batch):
            items = [self.clips[i] for i in own[first : first + self.batch]]
            yield collate(items, self.embeddings).inputs(self.config.conditioning, device)
