"""``hpdm plan``: predicts parameters, memory and work of training and sampling, without a GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hpdm import presets, systems
from hpdm.checks import Triple, at_least
from hpdm.files import write_json
from hpdm.long_video import LongOptions
from hpdm.planning.measure import measured_step
from hpdm.planning.parameters import parameters_by_part
from hpdm.planning.report import NOTE, plan_text, table1_text
from hpdm.planning.several_ranks import NODE, Layout, RankCost, rank_cost
from hpdm.planning.table1 import size, table1
from hpdm.planning.training_cost import RECOMPUTE, StepCost, largest_batch, training_step
from hpdm.recipe import Optimizer, Parallel
from hpdm.sampling import SamplerOptions
from hpdm.system import Architecture, System


@dataclass(frozen=True)
class PlanCommand:
    """Predict parameters, memory and work of a model, without a GPU."""

    preset: str = "hpdm_m"
    """hpdm_s, hpdm_m, hpdm_l, hpdm_t2v, hpdm_t2v_1k or tiny; lvdm_ae or lvdm_ae_tiny; lvdm_ucf, lvdm_released,
    lvdm_predict, lvdm_interpolate or lvdm_tiny."""
    resolution: Triple | None = None
    """Target frames, height, width; the preset's if not given."""
    patch: Triple | None = None
    """Patch frames, height, width; the preset's if not given."""
    self_conditioning: float = 0.0
    """As of `hpdm train`: with any share above 0 each step makes a first pass, without gradients."""
    known_frames: bool = False
    """As of `hpdm train`."""
    spacing: int = 1
    """As of `hpdm train`; --scheme hierarchical needs it."""
    memory: bool = False
    """As of `hpdm train`."""
    batch: int = 1
    """Clips per step and device."""
    kernels: Literal["both", "reference", "torch", "triton"] = "both"
    """The paper's formulas ("reference"), our ops in PyTorch's operations ("torch") or as kernels on an H100 ("triton":
    the same tensors are kept, but workspaces and traffic are other ones), or "both" of the first two."""
    recompute: Literal["all", "none", "selective", "block"] = "all"
    """What the backward pass computes again instead of keeping it; "all" compares the three settings."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" is automatic mixed precision."""
    optimizer: Optimizer = "adamw"
    averages: int = 1
    """Number of moving averages of the weights, each a copy of them: the widths of `hpdm train --ema`."""
    memory_gb: float | None = None
    """Also find the largest batch that fits into this many GB (1e9 bytes), e.g. 80 for an A100."""
    measure: bool = False
    """Also run each step on this machine and compare its peak memory with the prediction."""
    ranks: int = 1
    """Also plan the step over so many GPUs, each with its own clips: memory, traffic and least time of one of them."""
    parallel: Parallel | None = None
    """With --ranks: ddp, fsdp or hsdp, as for `hpdm train`; the preset's if not given."""
    shard_ranks: int | None = None
    """With --parallel hsdp: GPUs that share one copy of the weights. Default: 8, those of a node."""
    micro_batches: int = 1
    """With --ranks: micro-batches of --batch clips that a GPU accumulates in a step."""
    frames: int | None = None
    """Also plan the sampling of a video of so many frames, window by window."""
    long: Annotated[LongOptions, tyro.conf.arg(name="")] = field(default_factory=LongOptions)
    """With --frames: how the video goes on from window to window."""
    json: Path | None = None
    """Also write everything to this file."""
    table1: bool = False
    """Predict the ten cells of the paper's Table 1 instead, with this preset's widths."""


def run(options: PlanCommand) -> int:
    """The command ``hpdm plan``; returns the exit status."""
    system, config = systems.of_preset(options.preset), presets.get(options.preset)
    _check(options, config)
    result: Any
    if options.table1:
        result = table1(system, config)
        text = table1_text(options.preset, result)
        notes = [NOTE, "The paper does not say which of its models Table 1 was run on."]
    else:
        changes = Architecture(
            options.resolution, options.patch, self_conditioning=options.self_conditioning,
            known_frames=options.known_frames, spacing=options.spacing, memory=options.memory,
        )  # fmt: skip
        config = config if changes == Architecture() else system.configure(config, changes)
        result = plan(options, system, config)
        text, notes = plan_text(_heading(options.preset, config), result), [NOTE]
    print("\n".join([text, "", *notes]))
    if options.json is not None:
        write_json(options.json, result)
    return 0


def _check(options: PlanCommand, config: Any) -> None:
    """Checks the options before the long work begins; raises ValueError or FileNotFoundError."""
    at_least(options, 1, "batch", "averages", "ranks", "micro_batches", "shard_ranks", "frames")
    if options.memory_gb is not None and options.memory_gb <= 0:
        raise ValueError(f"memory-gb: got {options.memory_gb}, expected a positive number")
    if options.ranks > 1:
        _layout(options)
    for name in ("parallel", "shard_ranks", "micro_batches"):
        value = getattr(options, name)
        if options.ranks == 1 and value not in (None, 1):
            raise ValueError(f"{name}: got {value!r} with 1 rank, expected ranks of 2 or more")
    if options.json is not None and not options.json.parent.is_dir():
        raise FileNotFoundError(f"json: {options.json.parent} is no folder")
    if not options.table1:
        return
    allowed = ("preset", "json", "table1")
    defaults = PlanCommand()
    changed = [
        f.name
        for f in fields(options)
        if f.name not in allowed and getattr(options, f.name) != getattr(defaults, f.name)
    ]
    if changed:
        raise ValueError(f"table1: got {', '.join(changed)} too, expected preset and json alone")
    if not hasattr(config, "with_pyramid"):
        raise ValueError(f"table1: got preset {options.preset}, expected one of a model of patches")


def _layout(options: PlanCommand) -> Layout:
    """How the ranks share a step; raises ValueError for options that contradict each other."""
    parallel = options.parallel or presets.recipe(options.preset).parallel
    if parallel != "hsdp":
        if options.shard_ranks is not None:
            raise ValueError(f"shard_ranks: got {options.shard_ranks} with parallel={parallel!r}, expected 'hsdp'")
        return Layout(parallel, options.ranks, options.ranks if parallel == "fsdp" else 1, options.micro_batches)
    return Layout(parallel, options.ranks, options.shard_ranks or min(NODE, options.ranks), options.micro_batches)


def plan(options: PlanCommand, system: System, config: Any) -> dict[str, Any]:
    """Everything that ``--json`` writes.

    Returns:
        ``preset``; ``config``; ``parameters``, by part; ``published_parameters``, ``None`` if no number was published;
        ``training``, for each setting a row with the fields of :class:`~hpdm.planning.training_cost.StepCost` and
        derived numbers; ``sampling``, the rows of :meth:`~hpdm.system.System.sampling_plan`; with several ranks also
        ``ranks``, for each setting a row with the fields of :class:`~hpdm.planning.several_ranks.RankCost`; with frames
        ``long``, see :meth:`~hpdm.system.System.long_plan`.
    """
    costs = [_cost(options, system, config, setting, options.batch) for setting in _settings(options)]
    result = {
        "preset": options.preset,
        "config": config.to_dict(),
        "parameters": parameters_by_part(system, config),
        "published_parameters": presets.published_parameters(options.preset),
        "training": [_training(options, system, config, cost) for cost in costs],
        "sampling": system.sampling_plan(config, SamplerOptions()),
    }
    if options.frames is not None:
        result["long"] = system.long_plan(config, SamplerOptions(), options.long, options.frames)
    if options.ranks > 1:
        result["ranks"] = [_on_ranks(rank_cost(system, config, cost, _layout(options)), cost) for cost in costs]
    return result


def _cost(options: PlanCommand, system: System, config: Any, setting: tuple[str, str], batch: int) -> StepCost:
    """The cost of a training step with ``(kernels, recompute)`` on so many clips."""
    kernels, recompute = setting
    return training_step(
        system, config, batch, kernels, recompute, options.precision, options.optimizer, options.averages
    )


def _on_ranks(cost: RankCost, step: StepCost) -> dict[str, Any]:
    """A row of the plan of several ranks."""
    return {
        "kernels": step.kernels, "recompute": step.recompute, **asdict(cost), "peak_bytes": cost.peak_bytes,
        "hidden": {gpu: cost.hidden(gpu) for gpu in cost.least_step_seconds},
    }  # fmt: skip


def _settings(options: PlanCommand) -> list[tuple[str, str]]:
    """The training steps to predict, each as (kernels, recompute)."""
    compare_all = options.recompute == "all"
    settings: list[tuple[str, str]] = []
    if options.kernels in ("both", "reference"):
        settings.append(("reference", "none" if compare_all else options.recompute))
    if options.kernels != "reference":
        ours = "triton" if options.kernels == "triton" else "torch"
        settings += [(ours, recompute) for recompute in (RECOMPUTE if compare_all else (options.recompute,))]
    return settings


def _training(options: PlanCommand, system: System, config: Any, cost: StepCost) -> dict[str, Any]:
    """The cost of a training step, and on request the largest batch and the measured memory."""
    setting = cost.kernels, cost.recompute
    row = asdict(cost) | {"static_bytes": cost.static_bytes, "peak_bytes": cost.peak_bytes}
    row["flops_per_video"] = cost.flops / options.batch
    row["moved_bytes_per_video"] = cost.moved_bytes / options.batch
    if options.memory_gb is not None:
        row["largest_batch"] = largest_batch(
            int(options.memory_gb * 1e9), partial(_cost, options, system, config, setting)
        )
    if options.measure:
        backend = "reference" if cost.kernels == "reference" else "auto"
        row["measured_bytes"] = measured_step(
            system, config, options.batch, backend, cost.recompute, options.precision, options.optimizer,
            options.averages,
        )  # fmt: skip
    return row


def _heading(preset: str, config: Any) -> str:
    """The first line of a plan: size of the videos and, for a model of patches, the pyramid."""
    heading = f"{preset}: {size(config.resolution)}"
    if hasattr(config, "with_pyramid"):
        heading += (
            f" in patches of {size(config.patch)}, {config.levels} levels, "
            f"levels per block {'/'.join(map(str, config.levels_per_block))}"
        )
    return heading
