"""The learning rate of a step: warm-up, then a cosine or a constant, and its scale with the batch."""

from __future__ import annotations

import math

from hpdm.checks import check_choice
from hpdm.recipe import LrScaling, Recipe, Schedule


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, schedule: str = "cosine", cooldown: int = 0
) -> float:
    """Learning rate of the update from ``step`` to ``step + 1``.

    Args:
        step: updates done before, from 0.
        steps: last step of the run.
        warmup: steps of linear warm-up to ``peak``.
        peak: the largest rate.
        schedule: after the warm-up, ``"cosine"``: falls to 0 at ``steps`` (section 4.6); ``"constant"``: stays.
        cooldown: with ``"constant"``, the last so many steps fall linearly to 0.
    """
    rate = peak if step >= warmup else peak * (step + 1) / warmup
    if schedule == "constant":
        return rate * min(1.0, max(0, steps - step) / cooldown) if cooldown else rate
    if step < warmup:
        return rate
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def scaled_rate(rate: float, batch: int, rate_batch: int, scaling: str) -> float:
    """A learning rate that was found for batches of ``rate_batch`` clips, for batches of ``batch``.

    ``"sqrt"`` is the rule of LAMB (You et al. 2020, section 4) and of RIN's code, ``"linear"`` that of SGD
    (Goyal et al. 2017), ``"none"`` keeps the rate.
    """
    return rate * (batch / rate_batch) ** {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[scaling]


def check_schedule(recipe: Recipe) -> None:
    """Checks that a recipe's schedule, scaling and cooldown go together.

    Raises:
        ValueError: an unknown schedule or scaling, or a cooldown of a cosine or longer than the run.
    """
    check_choice("schedule", recipe.schedule, Schedule)
    check_choice("lr_scaling", recipe.lr_scaling, LrScaling)
    if recipe.cooldown and recipe.schedule != "constant":
        raise ValueError(f"cooldown: got {recipe.cooldown} with schedule {recipe.schedule}, expected 0 or constant")
    if recipe.cooldown > recipe.steps:
        raise ValueError(f"cooldown: got {recipe.cooldown}, expected at most the run's {recipe.steps} steps")


def rate_of_step(recipe: Recipe, step: int) -> float:
    """Learning rate of the update from ``step`` to ``step + 1`` under ``recipe``."""
    return learning_rate(step, recipe.steps, recipe.warmup, peak_rate(recipe), recipe.schedule, recipe.cooldown)


def peak_rate(recipe: Recipe) -> float:
    """The recipe's largest learning rate, scaled to its batch."""
    return scaled_rate(recipe.lr, recipe.batch, recipe.lr_batch or recipe.batch, recipe.lr_scaling)
