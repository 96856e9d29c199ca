"""``hpdm plan``: parameters, memory and work of training and sampling, before anything runs and without a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hpdm import presets
from hpdm.files import write_text
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.patch.rin import Recompute
from hpdm.planning.measure import measured_step
from hpdm.planning.sampling_cost import sampling_plan
from hpdm.planning.table1 import RECOMPUTE, size, table1, table1_text
from hpdm.planning.training_cost import CATEGORIES, StepCost, largest_batch, training_step

# Parts of the model by the name of the parameter; the first match counts.
_PARTS = (
    ("context fusion", ".fusion."),
    ("read attention", ".read"),
    ("latent layers", ".layers."),
    ("write attention", ".write"),
    ("token MLP and modulation", ".token_"),
    ("conditioning", "conditioner."),
    ("tokenizer, detokenizer, positions, latents", ""),
)


def parameters_by_part(config: HPDMConfig) -> dict[str, int]:
    """Number of parameters per part of the model, in a fixed order."""
    with torch.device("meta"):
        model = HPDM(config, kernels="reference")
    counts = {part: 0 for part, _ in _PARTS}
    for name, parameter in model.named_parameters():
        counts[next(part for part, text in _PARTS if text in name)] += parameter.numel()
    return counts


@dataclass(frozen=True)
class PlanCommand:
    """Predict parameters, memory and work of a model, without a GPU."""

    preset: str = "hpdm_m"
    """hpdm_s, hpdm_m, hpdm_l, hpdm_t2v, hpdm_t2v_1k or tiny."""
    resolution: tuple[int, int, int] | None = None
    """Target frames, height, width; the preset's if not given."""
    patch: tuple[int, int, int] | None = None
    """Patch frames, height, width; the preset's if not given."""
    batch: int = 1
    """Clips per step and device."""
    kernels: Literal["both", "reference", "torch", "triton"] = "both"
    """The paper's formulas ("reference"), our ops ("torch" and "triton" keep the same tensors: one row), or both."""
    recompute: Literal["all", "none", "selective", "block"] = "all"
    """What the backward pass computes again instead of keeping it; "all" compares the three settings."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" is automatic mixed precision."""
    optimizer: Literal["adamw", "lamb"] = "adamw"
    memory_gb: float | None = None
    """Also find the largest batch that fits into so many GB (1e9 bytes), as 80 for an A100."""
    measure: bool = False
    """Also run each step for real, here, and compare."""
    json: Path | None = None
    """Also write everything to this file."""
    table1: bool = False
    """Predict the ten cells of the paper's Table 1 instead, with this preset's widths."""

    def run(self) -> int:
        """Prints the plan; returns the exit status."""
        config = presets.get(self.preset)
        if self.batch < 1:
            raise ValueError(f"batch: got {self.batch}, expected at least 1")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise ValueError(f"memory-gb: got {self.memory_gb}, expected a positive number")
        if self.json is not None and not self.json.parent.is_dir():
            raise FileNotFoundError(f"json: {self.json.parent} is no folder")
        result: Any
        if self.table1:
            self._check_table1()
            result = table1(config)
            text = table1_text(self.preset, result)
            notes = [_NOTE, "The paper does not say which of its models Table 1 was run on."]
        else:
            if self.resolution or self.patch:
                config = config.with_pyramid(self.patch or config.patch, self.resolution or config.resolution)
            result = self._plan(config)
            text = _plan_text(self.preset, config, result)
            notes = [_NOTE]
        print("\n".join([text, "", *notes]))
        if self.json is not None:
            write_text(self.json, json.dumps(result, indent=1) + "\n")
        return 0

    def _check_table1(self) -> None:
        default = PlanCommand()
        free = ("preset", "json", "table1")
        given = [name for name in asdict(self) if name not in free and getattr(self, name) != getattr(default, name)]
        if given:
            raise ValueError(f"table1: got {', '.join(given)} too, expected preset and json alone")

    def _plan(self, config: HPDMConfig) -> dict[str, Any]:
        settings: list[tuple[str, Recompute]] = []
        for recompute in RECOMPUTE if self.recompute == "all" else (self.recompute,):
            if self.kernels != "reference":
                settings.append(("torch", recompute))
        if self.kernels in ("both", "reference"):
            settings.insert(0, ("reference", "none" if self.recompute == "all" else self.recompute))
        return {
            "preset": self.preset,
            "config": config.to_dict(),
            "parameters": parameters_by_part(config),
            "published_parameters": presets.PUBLISHED_PARAMETERS.get(self.preset),
            "training": [self._training(config, *setting) for setting in settings],
            "sampling": [asdict(plan) for plan in sampling_plan(config)],
        }

    def _training(self, config: HPDMConfig, kernels: str, recompute: Recompute) -> dict[str, Any]:
        def cost(batch: int) -> StepCost:
            return training_step(config, batch, kernels, recompute, self.precision, self.optimizer)

        here = cost(self.batch)
        row = asdict(here) | {"static_bytes": here.static_bytes, "peak_bytes": here.peak_bytes}
        row["flops_per_video"] = here.flops / self.batch
        row["moved_bytes_per_video"] = here.moved_bytes / self.batch
        if self.memory_gb is not None:
            row["largest_batch"] = largest_batch(int(self.memory_gb * 1e9), cost)
        if self.measure:
            backend = "reference" if kernels == "reference" else "auto"
            row["measured_bytes"] = measured_step(
                config, self.batch, backend, recompute, self.precision, self.optimizer
            )
        return row


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _plan_text(preset: str, config: HPDMConfig, result: dict[str, Any]) -> str:
    counts: dict[str, int] = result["parameters"]
    total = sum(counts.values())
    lines = [
        f"{preset}: {size(config.resolution)} in patches of {size(config.patch)}, {config.levels} levels, "
        f"levels per block {'/'.join(map(str, config.levels_per_block))}",
        "",
        "parameters [M]",
        *(f"  {part:<44}{count / 1e6:>10.2f}" for part, count in counts.items()),
        f"  {'total':<44}{total / 1e6:>10.2f}",
    ]
    published = result["published_parameters"]
    if published:
        lines.append(f"  {'published (Table 8)':<44}{published / 1e6:>10.0f}   deviation {total / published - 1:+.1%}")
    lines += ["", *_training_text(result["training"]), "", "sampling one video, default options, no guidance"]
    lines.append(
        f"  {'level':<7}{'resolution':<14}{'tiles':>6}{'steps':>7}{'calls':>8}{'patches':>10}{'TFLOP':>12}"
        f"{'cached blocks':>15}{'cache [GB]':>12}"
    )
    for plan in result["sampling"]:
        lines.append(
            f"  {plan['level']:<7}{size(plan['resolution']):<14}{plan['tiles']:>6}{plan['steps']:>7}"
            f"{plan['network_calls']:>8}{plan['patches']:>10}{plan['flops'] / 1e12:>12.1f}"
            f"{plan['cached_blocks']:>15}{_gb(plan['cache_bytes']):>12}"
        )
    return "\n".join(lines)


def _training_text(rows: Sequence[dict[str, Any]]) -> list[str]:
    first = rows[0]
    lines = [
        f"one training step of {first['batch']} clip(s), {first['precision']}, {first['optimizer']} [GB]",
        f"  {'kernels':<11}{'recompute':<11}" + "".join(f"{name:>12}" for name in CATEGORIES) + f"{'peak':>9}"
        f"{'TFLOP/video':>13}{'moved/video':>13}",
    ]
    for row in rows:
        lines.append(
            f"  {'reference' if row['kernels'] == 'reference' else 'on':<11}{row['recompute']:<11}"
            + "".join(f"{_gb(row[f'{name}_bytes']):>12}" for name in CATEGORIES)
            + f"{_gb(row['peak_bytes']):>9}{row['flops_per_video'] / 1e12:>13.3f}"
            f"{_gb(row['moved_bytes_per_video']):>13}"
        )
        if "largest_batch" in row:
            lines[-1] += f"   largest batch {row['largest_batch']}"
        if "measured_bytes" in row:
            ratio = row["peak_bytes"] / row["measured_bytes"]
            lines[-1] += f"   measured {_gb(row['measured_bytes'])} ({ratio - 1:+.1%})"
    return [*lines, "  all alive at the same moment, when most is; average: the moving average of the weights"]


_NOTE = (
    "Predicted from one training step on fake tensors. Left out: what PyTorch's operations allocate inside, the\n"
    "allocator's rounding, the CUDA context, the input video. FLOPs are those of products and attention; moved counts\n"
    "every operation's inputs and results once."
)
