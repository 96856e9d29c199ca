"""Validation during training: the denoising error on held-out clips, the same clips, times and noise each time."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpdm.data.clips import VideoDataset
from hpdm.evaluation.denoising import evaluate_denoising
from hpdm.runs import Run
from hpdm.system import System
from hpdm.text import EmbeddingStore

QUARTERS = 4
"""Ranges of the diffusion time, from clean to noise."""
BATCH = 8
"""Clips at a time. It is no option, since the noise depends on it."""
SEED = 0
"""Of boxes, times and noise: the same for all runs, so that they can be compared."""


class Validation:
    """The denoising error per loss (the level of a pyramid) and quarter of the diffusion time.

    It draws from generators of its own, so a run with it has the weights of a run without it.

    Args:
        system, config: kind and config of the model.
        clips: held-out clips at the model's resolution, with the model's classes.
        count: number of clips to take, spread evenly over the set; all of the set if it has fewer.
        embeddings: of the clips' captions, for a model with text.
    """

    def __init__(
        self, system: System, config: Any, clips: VideoDataset, count: int, embeddings: EmbeddingStore | None
    ) -> None:
        self.system, self.config, self.clips, self.count, self.embeddings = system, config, clips, count, embeddings

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """The errors of ``model``, which is in eval mode. A collective: ranks share the clips.

        Returns:
            For each loss ``validation_{loss}_t0`` to ``_t3``, from clean to noise, and their mean,
            ``validation_{loss}``; of a model without diffusion times this mean alone.
        """
        run = Run(model, self.config, self.clips.class_names, {}, 0, self.system)
        result = evaluate_denoising(
            run, self.clips, clips=self.count, bins=QUARTERS if self.system.generates else 1, batch=BATCH, seed=SEED,
            embeddings=self.embeddings, progress=False,
        )  # fmt: skip
        row: dict[str, float] = {}
        for name, errors in zip(result["losses"], result["error"]):
            known = [error for error in errors if error is not None]
            if len(known) == len(errors):
                row[f"validation_{name}"] = sum(errors) / len(errors)
            if len(errors) == 1:
                continue
            row |= {f"validation_{name}_t{n}": error for n, error in enumerate(errors) if error is not None}
        return row
