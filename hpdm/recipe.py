"""How a model is trained: steps, batch, optimizer, schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["adamw", "lamb"]
Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Recipe:
    """How a preset is trained: the defaults of ``hpdm train``. The values below are Table 8's."""

    steps: int = 40_000
    batch: int = 768
    """Clips per step, over all processes."""
    images: float = 0.0
    """Share of the batch that are still videos, each one frame repeated (section 5.2)."""
    optimizer: Optimizer = "lamb"
    lr: float = 5e-3
    """Learning rate after the warm-up, from where it falls to 0 along a cosine (section 4.6)."""
    warmup: int = 10_000
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    ema: float = 0.9999
    """Decay of the moving average of the weights. The paper uses an average but does not give its decay."""
    parallel: Parallel = "ddp"
    """With several processes: replicated or sharded."""


@dataclass(frozen=True)
class RecipeChanges:
    """Changes of a run to its preset's recipe; ``None`` keeps the preset's value."""

    steps: int | None = None
    batch: int | None = None
    """Clips per step, over all processes."""
    optimizer: Optimizer | None = None
    lr: float | None = None
    """Learning rate after the warm-up, from where it falls to 0 along a cosine."""
    warmup: int | None = None
    """Steps of linear warm-up."""
    weight_decay: float | None = None
    ema: float | None = None
    """Decay of the moving average of the weights."""
    images: float | None = None
    """Share of the batch that are still videos, each one frame of a clip repeated."""
    parallel: Parallel | None = None
    """With several processes: ddp (replicated) or fsdp (sharded)."""

    def applied_to(self, recipe: Recipe) -> Recipe:
        """``recipe`` with those fields replaced that are not ``None`` here."""
        changes = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(recipe, **changes)
