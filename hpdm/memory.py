"""``hpdm plan``: parameters, memory and work of a model before it runs, without a GPU and without memory for it.

Memory and FLOPs come from one forward and backward pass of the real model on fake tensors, which have shapes but no
data: every operation runs through PyTorch, each storage is counted when it appears and when it dies, and products
are counted by PyTorch's formulas. With the kernels on, an op is one operation: what it takes, gives and saves is
counted, its short-lived workspace inside is not, and neither are the allocator's rounding and fragmentation.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from hpdm import presets
from hpdm.config import HPDMConfig
from hpdm.model import HPDM
from hpdm.pyramid import parse_overlap, tiling
from hpdm.sampler import SamplerOptions

TEXT_TOKENS = 77
"""Length of the text that a text-conditional model is planned for."""

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

# Paper Table 1: memory at batch 1 in GB and training videos/s on one A100 80 GB, at 64x256^2 and 64x512^2.
_TABLE1: tuple[tuple[str, tuple[int, int, int] | None, bool, tuple[float | None, ...]], ...] = (
    ("full resolution", None, False, (65.3, 1.24, None, None)),
    ("HPDM", (32, 128, 128), False, (29.0, 2.64, 41.3, 1.55)),
    ("HPDM", (32, 128, 128), True, (23.4, 3.58, 29.9, 2.49)),
    ("HPDM", (16, 64, 64), False, (18.1, 4.25, 22.1, 2.78)),
    ("HPDM", (16, 64, 64), True, (14.2, 6.71, 16.3, 4.96)),
)
_TABLE1_RESOLUTIONS = ((64, 256, 256), (64, 512, 512))


@dataclass(frozen=True)
class StepCost:
    """One training step."""

    kernels: str
    batch: int
    static_bytes: int
    """Weights, two moments and the moving average, fp32; the gradients come on top during a step."""
    activation_bytes: int
    """Most that is alive at once beyond that in forward and backward: activations and the gradients so far."""
    update_bytes: int
    """While the optimizer works: the static part, all gradients and one temporary copy of the weights."""
    flops: int
    """Products and attention, forward and backward."""

    @property
    def peak_bytes(self) -> int:
        """Most that is alive at once in the whole step."""
        return max(self.static_bytes + self.activation_bytes, self.update_bytes)


def parameters_by_part(config: HPDMConfig) -> dict[str, int]:
    """Number of parameters per part of the model, in a fixed order."""
    with torch.device("meta"):
        model = HPDM(config, kernels="reference")
    counts = {part: 0 for part, _ in _PARTS}
    for name, parameter in model.named_parameters():
        counts[next(part for part, text in _PARTS if text in name)] += parameter.numel()
    return counts


def _fuse_forward_flops(
    x: Tensor, sources: Any, source_boxes: Any, box: Any, weight: Any, bias: Any, index: Any, grids: Any, grid: Any,
    footprints: Sequence[int], *rest: Any, **kwargs: Any,
) -> int:  # fmt: skip
    b, n, d = x.shape
    touched = sum(math.prod(footprints[i : i + 3]) for i in range(0, len(footprints), 3))
    return 2 * b * (n + touched) * d * d


def _fuse_backward_flops(grad: Tensor, *arguments: Any, **kwargs: Any) -> int:
    # Each product of the forward has two in the backward: for its input and for the weight.
    return 2 * _fuse_forward_flops(*arguments, **kwargs)


class _Ledger(TorchDispatchMode):
    """Counts the bytes of live storages and the FLOPs of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self.known: dict[int, weakref.ref[Any]] = {}
        self.formulas: dict[Any, Callable[..., int]] = dict(flop_registry)
        self.formulas.setdefault(torch.ops.hpdm.fuse_context_fwd, _fuse_forward_flops)
        self.formulas.setdefault(torch.ops.hpdm.fuse_context_bwd, _fuse_backward_flops)

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """These count elsewhere."""
        for tensor in tensors:
            self._add(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, leaf.untyped_storage().nbytes())
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=out))
        return out

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.live -= size

        self.known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def _example(config: HPDMConfig, batch: int) -> dict[str, Tensor]:
    inputs = {
        "x": torch.empty(batch, config.levels, config.channels, *config.patch),
        "boxes": torch.empty(batch, config.levels, 6),
        "t": torch.empty(batch, config.levels),
    }
    if config.conditioning == "class":
        inputs["labels"] = torch.empty(batch, dtype=torch.long)
    if config.conditioning == "text":
        inputs["text"] = torch.empty(batch, TEXT_TOKENS, config.text_width)
    return inputs


@contextmanager
def _fp32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def training_step(config: HPDMConfig, batch: int = 1, kernels: str = "torch") -> StepCost:
    """Memory and FLOPs of one fp32 training step, from a pass on fake tensors.

    Args:
        config: the model.
        batch: clips per step and device, at least 1.
        kernels: ``"reference"`` (the paper's formulas) or ``"torch"`` (the ops as single operations; the Triton kernels
            take, give and save the same).

    Raises:
        ValueError: ``batch`` or ``kernels`` out of range.
    """
    if batch < 1:
        raise ValueError(f"batch: got {batch}, expected at least 1")
    if kernels not in ("reference", "torch"):
        raise ValueError(f"kernels: got {kernels!r}, expected 'reference' or 'torch'")
    with _fp32(), FakeTensorMode():
        model = HPDM(config, kernels=kernels)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        with _Ledger() as ledger:
            ledger.ignore(model.parameters())
            inputs = _example(config, batch)
            target = torch.empty_like(inputs["x"])
            (model(**inputs) - target).square().mean().backward()
    return StepCost(kernels, batch, 4 * weights, ledger.peak, 6 * weights, ledger.flops)


@dataclass(frozen=True)
class LevelPlan:
    """Sampling one level of one video."""

    level: int
    resolution: tuple[int, int, int]
    tiles: int
    steps: int
    predictions: int
    """Denoising passes over the whole level; second order takes two per step but the last."""
    network_calls: int
    """Batches of at most ``tile_batch`` patches through the network, the pass that fills the cache included."""
    patches: int
    """Patches through the network in all of them."""
    cached_blocks: int
    """Blocks whose inputs are kept for the levels above."""
    cache_bytes: int
    """What that takes, fp32."""


def sampling_plan(config: HPDMConfig, options: SamplerOptions | None = None) -> list[LevelPlan]:
    """Tiles, calls and cached features per level of sampling one video with ``options``."""
    options = options or SamplerOptions()
    overlap = parse_overlap(options.overlap)
    copies = 1 if options.guidance == 1.0 else 2
    chunk = max(1, options.tile_batch // copies)
    fuses = config.fusion == "deep"
    plans = []
    for level in range(config.levels):
        tiles = tiling(config, level, overlap).tiles
        steps = options.level_steps(level)
        predictions = 2 * steps - 1 if level == 0 and options.second_order else steps
        last = level == config.levels - 1
        cached = 0 if last or not fuses else sum(n > level + 1 for n in config.levels_per_block)
        passes = predictions + (0 if last or not fuses else 1)
        plans.append(
            LevelPlan(
                level=level,
                resolution=config.level_resolution(level),
                tiles=tiles,
                steps=steps,
                predictions=predictions,
                network_calls=passes * math.ceil(tiles / chunk),
                patches=passes * tiles * copies,
                cached_blocks=cached,
                cache_bytes=copies * tiles * cached * config.tokens * config.width * 4,
            )
        )
    return plans


def table1_config(
    base: HPDMConfig, patch: tuple[int, int, int] | None, resolution: tuple[int, int, int], adaptive: bool
) -> HPDMConfig:
    """The model of one row of Table 1.

    64x512^2 is not ``patch * ratio^l`` for one ratio per axis. The levels follow from height and width, which set the
    memory; frames are taken to grow at every level too, which touches only the size of the footprints.
    """
    patch = patch or resolution
    growth = resolution[1] // patch[1]
    config = base.with_pyramid(patch, tuple(n * growth for n in patch))
    return config if adaptive else config.without_adaptive_computation()


def table1(base: HPDMConfig) -> list[dict[str, Any]]:
    """The ten cells of the paper's Table 1, predicted and published, batch 1."""
    rows = []
    for column, resolution in enumerate(_TABLE1_RESOLUTIONS):
        for method, patch, adaptive, published in _TABLE1:
            config = table1_config(base, patch, resolution, adaptive)
            plain, fused = (training_step(config, 1, kernels) for kernels in ("reference", "torch"))
            rows.append(
                {
                    "method": method,
                    "resolution": _size(resolution),
                    "patch": _size(config.patch),
                    "adaptive": adaptive,
                    "levels_per_block": list(config.levels_per_block),
                    "published_gb": published[2 * column],
                    "published_videos_per_s": published[2 * column + 1],
                    "reference_gb": plain.peak_bytes / 1e9,
                    "kernels_gb": fused.peak_bytes / 1e9,
                    "tflop_per_video": plain.flops / 1e12,
                    "kernels_tflop_per_video": fused.flops / 1e12,
                }
            )
    return rows


def _size(triple: Sequence[int]) -> str:
    return "x".join(map(str, triple))


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
    """The paper's formulas ("reference"), our ops ("torch" and "triton" save the same tensors: one row), or both."""
    json: Path | None = None
    """Also write everything to this file."""
    table1: bool = False
    """Predict the ten cells of the paper's Table 1 instead, with this preset's widths."""

    def run(self) -> int:
        """Prints the plan; returns the exit status."""
        config = presets.get(self.preset)
        if self.table1:
            if self.resolution or self.patch or self.batch != 1 or self.kernels != "both":
                raise ValueError("table1: got --resolution, --patch, --batch or --kernels too, expected --preset alone")
            result: dict[str, Any] = {"preset": self.preset, "table1": table1(config)}
            text = _table1_text(self.preset, result["table1"])
        else:
            if self.resolution or self.patch:
                config = config.with_pyramid(self.patch or config.patch, self.resolution or config.resolution)
            result = self._plan(config)
            text = _plan_text(self.preset, config, result)
        print(text)
        if self.json is not None:
            self.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0

    def _plan(self, config: HPDMConfig) -> dict[str, Any]:
        both = self.kernels == "both"
        names = ("reference", "torch") if both else ("reference" if self.kernels == "reference" else "torch",)
        costs = [training_step(config, self.batch, name) for name in names]
        return {
            "preset": self.preset,
            "config": config.to_dict(),
            "parameters": parameters_by_part(config),
            "published_parameters": presets.PUBLISHED_PARAMETERS.get(self.preset),
            "training": [asdict(cost) | {"peak_bytes": cost.peak_bytes} for cost in costs],
            "sampling": [asdict(plan) for plan in sampling_plan(config)],
        }


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _plan_text(preset: str, config: HPDMConfig, result: dict[str, Any]) -> str:
    counts: dict[str, int] = result["parameters"]
    total = sum(counts.values())
    lines = [
        f"{preset}: {_size(config.resolution)} in patches of {_size(config.patch)}, {config.levels} levels, "
        f"levels per block {'/'.join(map(str, config.levels_per_block))}",
        "",
        "parameters [M]",
        *(f"  {part:<44}{count / 1e6:>10.2f}" for part, count in counts.items()),
        f"  {'total':<44}{total / 1e6:>10.2f}",
    ]
    published = result["published_parameters"]
    if published:
        lines.append(f"  {'published (Table 8)':<44}{published / 1e6:>10.0f}   deviation {total / published - 1:+.1%}")
    lines += ["", "one training step, fp32 [GB]"]
    lines.append(f"  {'kernels':<12}{'batch':>6}{'static':>9}{'activations':>13}{'update':>9}{'peak':>9}{'TFLOP':>10}")
    for cost in result["training"]:
        name = "reference" if cost["kernels"] == "reference" else "kernels"
        lines.append(
            f"  {name:<12}{cost['batch']:>6}{_gb(cost['static_bytes']):>9}{_gb(cost['activation_bytes']):>13}"
            f"{_gb(cost['update_bytes']):>9}{_gb(cost['peak_bytes']):>9}{cost['flops'] / 1e12:>10.3f}"
        )
    lines += [
        "  static: weights, two moments, moving average; activations include gradients as they come; update: static,",
        "  gradients and one temporary copy; peak: the larger of static + activations and update.",
        "",
        "sampling one video, default options, no guidance",
        f"  {'level':<7}{'resolution':<14}{'tiles':>6}{'steps':>7}{'calls':>8}{'patches':>10}"
        f"{'cached blocks':>15}{'cache [GB]':>12}",
    ]
    for plan in result["sampling"]:
        lines.append(
            f"  {plan['level']:<7}{_size(plan['resolution']):<14}{plan['tiles']:>6}{plan['steps']:>7}"
            f"{plan['network_calls']:>8}{plan['patches']:>10}{plan['cached_blocks']:>15}{_gb(plan['cache_bytes']):>12}"
        )
    return "\n".join([*lines, "", _NOTE])


def _table1_text(preset: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"Table 1 with {preset}: peak memory of a training step at batch 1 [GB], work per video [TFLOP]",
        f"  {'method':<17}{'resolution':<13}{'patch':<13}{'adaptive':<10}{'published':>10}{'reference':>11}"
        f"{'kernels':>9}{'TFLOP':>9}{'videos/s published':>20}",
    ]
    for row in rows:
        gb, speed = row["published_gb"], row["published_videos_per_s"]
        lines.append(
            f"  {row['method']:<17}{row['resolution']:<13}{row['patch']:<13}{'yes' if row['adaptive'] else 'no':<10}"
            f"{'OOM' if gb is None else f'{gb:.1f}':>10}{row['reference_gb']:>11.1f}{row['kernels_gb']:>9.1f}"
            f"{row['tflop_per_video']:>9.2f}{'OOM' if speed is None else f'{speed:.2f}':>20}"
        )
    return "\n".join([*lines, "", "The paper does not say which of its models Table 1 was run on.", _NOTE])


_NOTE = (
    "Predicted from one forward and backward pass on fake tensors; not measured. Left out: workspaces inside the ops,\n"
    "the allocator's rounding, the CUDA context, the input video. FLOPs are those of products and attention."
)
