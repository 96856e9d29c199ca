"""Going on with a run: what the same command may change, what it may not, and a record of what it changed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpdm import distributed, presets, runs
from hpdm.recipe import Recipe, recipe_from_json
from hpdm.training.checkpoint import list_checkpoints, read_state
from hpdm.training.options import TrainOptions
from hpdm.training.steering import Steering
from hpdm.training.trainer import Job

logger = logging.getLogger(__name__)

CLEAN_CONTEXT = 0.25
"""Share of samples with finished lower levels in a new run (docs/learning.md)."""

# Options that may change when a run is resumed: they change its loss curve by rounding at most. What the folders hold
# is checked by itself.
_ROUNDING = {
    "data", "out", "autoencoder", "latents", "decoder", "kernels", "recompute", "parallel", "shard_ranks", "compile",
    "workers", "cache_mb", "device", "log", "log_every", "save_every", "sample_every", "sample_steps", "profile",
    "max_skipped", "timeout",
    *(f.name for f in dataclasses.fields(Steering)),
}  # fmt: skip
# Options that may change, and then change the curve from the step on at which the run goes on.
_SCHEDULE = ("steps", "lr", "lr_scaling", "schedule", "cooldown")
# A run of an earlier version lacks the options that were added later; it ran with these values, or with what is now
# their default. Those of the recipe are in hpdm.recipe.
_BEFORE: dict[str, Any] = {
    "data_weights": [1.0], "short": "error", "boxes": "nested", "clean_context": 0.0, "draws": "micro-batch",
}  # fmt: skip


def recipe_of(options: TrainOptions) -> Recipe:
    """The preset's recipe, or that of the run to resume, with the changes in ``options``.

    Raises:
        ValueError: options that exclude each other.
    """
    recipe = presets.recipe(options.preset)
    if list_checkpoints(options.out):
        recipe = recipe_from_json(runs.load_run_config(options.out).training, recipe)
    return options.recipe.applied_to(recipe)


def with_options_of_run(options: TrainOptions) -> TrainOptions:
    """``options`` whose open choices are made: as in the run to resume, or the default of new runs."""
    made: dict[str, Any] = {"short": "skip", "boxes": "uniform", "clean_context": CLEAN_CONTEXT, "draws": "step"}
    if list_checkpoints(options.out):
        made = _BEFORE | runs.load_run_config(options.out).training
    objective = options.objective
    share = objective.clean_context
    return dataclasses.replace(
        options,
        short=options.short or made["short"],
        objective=dataclasses.replace(
            objective,
            boxes=objective.boxes or made["boxes"],
            clean_context=made["clean_context"] if share is None else share,
            draws=objective.draws or made["draws"],
        ),
    )


def check_resumable(job: Job, class_names: list[str]) -> int:
    """Checks that a job continues the run in its folder: same model, classes, batches and seed.

    Returns the size of the run's micro-batches. Its noise depends on it, so it does not follow the number of ranks.

    Raises:
        ValueError: the job differs from the run in more than its schedule, or ends before the step that is reached.
    """
    options, out = job.options, job.options.out
    old = runs.load_run_config(out)
    if old.system is not job.system or old.config != job.config:
        changed = _listed(_changes(old.config.to_dict(), job.config.to_dict()))
        raise ValueError(f"out: {out} holds a run of another config ({changed}); choose another folder")
    if old.classes != class_names:
        raise ValueError(f"data: got classes {class_names}, expected {old.classes} as in the run at {out}")
    before = _options_before(job)
    free = options.micro_batch in (None, "auto")  # a resumed run keeps the micro-batches that it has
    now = options.as_json(job.recipe) | ({"micro_batch": before["micro_batch"]} if free else {})
    may_change = {*_ROUNDING, *_SCHEDULE}
    if "loop" not in (before["short"], now["short"]):
        may_change.add("short")  # as long as no clip is short, skip and error are the same
    changed = _listed(_changes(before, {name: value for name, value in now.items() if name not in may_change}))
    if changed:
        raise ValueError(f"out: {out} holds a run with other options ({changed}); choose another folder")
    done = _steps_done(out)
    if job.recipe.steps < done:
        raise ValueError(f"steps: got {job.recipe.steps}, expected at least {done}, which the run at {out} has done")
    return int(before["micro_batch"])


def history(job: Job, inputs: Mapping[str, tuple[Any, Any]]) -> list[dict[str, Any]]:
    """How the run in a job's folder changed, with what the job changes now, which is also logged.

    Args:
        job: gives the schedule.
        inputs: ``(before, now)`` of the clips and embeddings that the job changes.

    Returns:
        For every change ``step``, at which the run went on, and ``changes``, by option the pair of old and new value.
    """
    stored = runs.load_run_config(job.options.out).training
    changes = _changes(_options_before(job), _schedule(job.recipe)) | dict(inputs)
    earlier = list(stored.get("history", []))
    if not changes:
        return earlier
    step = _steps_done(job.options.out)
    if distributed.is_first():
        logger.warning("%s goes on from step %d with %s", job.options.out, step, _listed(changes))
    return [*earlier, {"step": step, "changes": {name: list(pair) for name, pair in changes.items()}}]


def _options_before(job: Job) -> dict[str, Any]:
    """The options of the run in the job's folder, those included that its version did not have."""
    options = job.options
    stored = runs.load_run_config(options.out).training
    recipe = recipe_from_json(stored, presets.recipe(options.preset))
    defaults = TrainOptions(data=options.data, out=options.out, preset=options.preset).as_json(recipe)
    of_recipe = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return defaults | _BEFORE | stored | of_recipe


def _schedule(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in _SCHEDULE}


def _steps_done(run: Path) -> int:
    return int(read_state(list_checkpoints(run)[-1])["step"])


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """``(before, now)`` of the options that differ, by name."""
    return {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}


def _listed(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changes.items())
