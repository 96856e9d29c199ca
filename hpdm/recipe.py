"""How a model is trained: steps, batch, optimizer, schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hpdm.json_file import checked

Optimizer = Literal["adamw", "lamb", "muon"]
""""muon": Muon for the matrices inside the network, AdamW for the rest; see :mod:`hpdm.training.muon`."""
Parallel = Literal["ddp", "fsdp", "hsdp"]
""""hsdp": sharded inside of a node and replicated over the nodes; see :mod:`hpdm.training.parallel`."""
Schedule = Literal["cosine", "constant"]
LrScaling = Literal["none", "sqrt", "linear"]
LambFloor = Literal["xavier", "off"]


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
    lr_scaling: LrScaling = "none"
    """How ``lr`` follows the batch: not at all, or as the root or the multiple of ``batch / lr_batch``."""
    lr_batch: int | None = None
    """Batch that ``lr`` is for; ``None`` for ``batch``."""
    warmup: int = 10_000
    """Steps of linear warm-up."""
    schedule: Schedule = "cosine"
    """After the warm-up: falls to 0 along a cosine, or stays."""
    cooldown: int = 0
    """With a constant schedule: the last so many steps fall linearly to 0."""
    weight_decay: float = 0.01
    lamb_floor: LambFloor = "xavier"
    """The norm that matrices that start at zero count with at least; see :mod:`hpdm.training.lamb`."""
    ema: tuple[float, ...] = (0.05,)
    """Relative widths of the moving averages of the weights; see :mod:`hpdm.training.ema`. The paper uses an average
    but does not give its length."""
    ema_decay: float | None = None
    """Decay of a single moving average in their place."""
    parallel: Parallel = "ddp"
    """With several processes: replicated, sharded, or sharded inside of each node and replicated over the nodes."""
    shard_ranks: int | None = None
    """With ``"hsdp"``: processes that share one copy of the weights; ``None`` for those of a node."""


@dataclass(frozen=True)
class RecipeChanges:
    """Changes of a run to its preset's recipe, or to that of the run that goes on; ``None`` keeps the value."""

    steps: int | None = None
    """Last step. A run that goes on, also one that is finished, may be given more."""
    batch: int | None = None
    """Clips per step, over all processes."""
    optimizer: Optimizer | None = None
    lr: float | None = None
    """Learning rate after the warm-up."""
    lr_scaling: LrScaling | None = None
    """How the learning rate follows the batch: sqrt or linear in batch / the preset's batch, which is what the rate is
    for, or none. Default: none."""
    warmup: int | None = None
    """Steps of linear warm-up."""
    schedule: Schedule | None = None
    """After the warm-up: cosine falls to 0 at the last step, constant stays. Default: cosine."""
    cooldown: int | None = None
    """With --schedule constant: the last so many steps fall linearly to 0. Default: 0."""
    weight_decay: float | None = None
    lamb_floor: LambFloor | None = None
    """LAMB's steps are as long as a share of a matrix' norm. For a matrix that starts at zero, xavier counts at least
    the norm of Xavier's initialization, off the norm that it has, so that it hardly moves. Default: xavier."""
    ema: tuple[float, ...] | None = None
    """Relative widths of the moving averages of the weights, one or several (0.05 0.10), each a copy of them. Sampling
    takes the first, or with --weights ema-0.10 another one."""
    ema_decay: float | None = None
    """One moving average with this decay in their place, at step n at most (1 + n) / (10 + n), which reaches 0.9999
    after 90,000 steps."""
    images: float | None = None
    """Share of the batch that are still videos, each one frame of a clip repeated."""
    parallel: Parallel | None = None
    """With several processes: ddp (replicated), fsdp (sharded), or hsdp (sharded inside of each node and replicated
    over the nodes)."""
    shard_ranks: int | None = None
    """With --parallel hsdp: processes that share one copy of the weights. Default: those of a node."""

    def applied_to(self, recipe: Recipe) -> Recipe:
        """``recipe`` with those fields replaced that are not ``None`` here.

        Averages of one kind replace those of the other. ``lr`` stays the rate for the batch of ``recipe``.

        Raises:
            ValueError: both kinds of averages, or ``shard_ranks`` with another way than ``"hsdp"``.
        """
        changes: dict[str, Any] = {name: value for name, value in _fields(self).items() if value is not None}
        if self.ema is not None and self.ema_decay is not None:
            raise ValueError(f"ema: got {list(self.ema)} and ema_decay {self.ema_decay}, expected one of the two")
        if self.ema is not None:
            changes["ema_decay"] = None
        if self.ema_decay is not None:
            changes["ema"] = ()
        parallel = self.parallel or recipe.parallel
        if parallel != "hsdp":
            if self.shard_ranks is not None:
                raise ValueError(f"shard_ranks: got {self.shard_ranks} with parallel={parallel!r}, expected 'hsdp'")
            changes["shard_ranks"] = None
        changes.setdefault("lr_batch", recipe.lr_batch or recipe.batch)
        return dataclasses.replace(recipe, **changes)


def recipe_from_json(values: Mapping[str, Any], preset: Recipe) -> Recipe:
    """The recipe of a run from the options in its ``config.json``.

    Args:
        values: the run's options.
        preset: the recipe of the run's preset, for fields that ``values`` lacks; those that came later than the run
            have the value that it was trained with.

    Raises:
        ValueError: a value of another type than the recipe's.
    """
    before = {"lr_scaling": "none", "lr_batch": preset.batch, "schedule": "cosine", "cooldown": 0}
    before |= {"lamb_floor": "off", "ema_decay": None}
    known = _fields(preset) | before | {name: values[name] for name in _fields(preset) if name in values}
    if isinstance(known["ema"], int | float):  # the decay of the only average
        known |= {"ema": (), "ema_decay": float(known["ema"])}
    recipe: Recipe = checked(known, Recipe, "config: training")
    return recipe


def _fields(values: Recipe | RecipeChanges) -> dict[str, Any]:
    return {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
