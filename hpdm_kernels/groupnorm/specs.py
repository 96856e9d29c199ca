"""The kernels of group normalization in every configuration that is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.groupnorm import triton_kernels
from hpdm_kernels.groupnorm.block_sizes import CELLS, GROUP_CHANNELS, tile_of


class Dtypes(NamedTuple):
    """Triton's types of ``x`` and all that is like it, of weight and bias, of scale and shift."""

    rows: str
    weights: str
    modulation: str


DTYPES = {
    "fp32": Dtypes("*fp32", "*fp32", "*fp32"), "bf16": Dtypes("*bf16", "*bf16", "*bf16"),
    "fp16": Dtypes("*fp16", "*fp16", "*fp16"), "bf16+fp32": Dtypes("*bf16", "*fp32", "*bf16"),
}  # fmt: skip
"""All of one dtype; and as under autocast, where only the weights have 32 bits."""
WIDTHS = (64, 256)
"""Channels with a tile of their own each: the autoencoder's, and the U-Net's on the first level."""
VARIANTS: dict[str, dict[str, Any]] = {
    "": {"MODULATED": False, "SILU": True, "PAD": False}, ",mod": {"MODULATED": True, "SILU": True, "PAD": False},
    ",none": {"MODULATED": False, "SILU": False, "PAD": False}, ",pad": {"MODULATED": False, "SILU": True, "PAD": True},
}  # fmt: skip
"""What follows the norm: SiLU; a modulation before it; nothing; repeated edges behind it."""
_GRAD, _X = (tuple(f"stride_{name}_{axis}" for axis in "bthw") for name in ("grad", "x"))
_MODULATION = ("stride_scale_b", "stride_scale_t", "stride_shift_b", "stride_shift_t")
_PLACES = ("frames", "height", "width", "channels", "group_width", "statistics", "front_t", "front_h", "front_w")


def configurations() -> Iterator[tuple[str, int, str]]:
    """Dtypes, channels and variant of the kernels that read ``x``: all for fp32, the models' for 16 bits."""
    for label in DTYPES:
        for channels in WIDTHS if label == "fp32" else WIDTHS[-1:]:
            yield from ((label, channels, v) for v in (VARIANTS if label == "fp32" else (",mod", ",pad")))


def aot_specs() -> list[KernelSpec]:
    """Every kernel for every configuration."""
    specs = [_statistics()]
    for label, channels in dict.fromkeys((label, channels) for label, channels, _ in configurations()):
        if label != "bf16+fp32":
            specs.append(_moments(label, channels))
    for label in DTYPES:
        specs += [_gradients(label, variant) for variant in ("", ",mod")]
    for label, channels, variant in configurations():
        specs += [_backward(name, label, channels, variant) for name in ("sums", "bwd")]
        # Forward repeated edges are but other places, of which no code depends.
        if label == "fp32" and variant == ",pad":
            continue
        specs.append(_forward(label, channels, variant.replace(",pad", "")))
    return specs


def _spec(
    name: str, kernel: Any, pointers: dict[str, str], strides: tuple[str, ...], sizes: tuple[str, ...],
    constants: dict[str, Any], eps: bool = False,
) -> KernelSpec:  # fmt: skip
    signature = {f"{name}_ptr": pointer for name, pointer in pointers.items()}
    aligned = (*signature, *strides, "channels") if strides else tuple(signature)
    signature |= dict.fromkeys(strides, "i64") | dict.fromkeys(sizes, "i32") | ({"eps": "fp32"} if eps else {})
    signature |= dict.fromkeys(constants, "constexpr")
    return KernelSpec(name, kernel, signature, constants, num_warps=4, aligned=aligned)


def _vectors(types: Dtypes) -> dict[str, str]:
    return {"weight": types.weights, "bias": types.weights, "scale": types.modulation, "shift": types.modulation}


def _moments(label: str, channels: int) -> KernelSpec:
    pointers = {"x": DTYPES[label].rows, "moments": "*fp32"}
    return _spec(
        f"group_moments[{label},C={channels}]", triton_kernels.group_moments_kernel, pointers, _X,
        ("frames", "width", "rows", "channels", "chunks", "chunk"), tile_of(channels).blocks,
    )  # fmt: skip


def _statistics() -> KernelSpec:
    return _spec(
        "group_statistics[fp32]", triton_kernels.group_statistics_kernel,
        dict.fromkeys(("moments", "mean", "rstd"), "*fp32"), (),
        ("groups", "group_width", "frames", "chunks", "chunk", "rows"), {"BLOCK": CELLS}, eps=True,
    )  # fmt: skip


def _forward(label: str, channels: int, variant: str) -> KernelSpec:
    types, flags = DTYPES[label], VARIANTS[variant]
    pointers = {"x": types.rows, **_vectors(types), "mean": "*fp32", "rstd": "*fp32", "out": types.rows}
    constants = {name: flags[name] for name in ("MODULATED", "SILU")} | tile_of(channels).blocks
    return _spec(
        f"group_norm_act_fwd[{label},C={channels}{variant}]", triton_kernels.group_norm_act_fwd_kernel, pointers,
        (*_X, *_MODULATION), (*_PLACES, "out_frames", "out_width", "out_rows", "chunks", "chunk"), constants,
    )  # fmt: skip


def _backward(kernel: str, label: str, channels: int, variant: str) -> KernelSpec:
    types = DTYPES[label]
    pointers = {"grad": types.rows, "x": types.rows, **_vectors(types), "mean": "*fp32", "rstd": "*fp32"}
    pointers |= {"sums": "*fp32"} if kernel == "sums" else {"means": "*fp32", "dx": types.rows}
    tile = tile_of(channels, VARIANTS[variant]["PAD"] and types.rows == "*fp32")
    return _spec(
        f"group_norm_act_{kernel}[{label},C={channels}{variant}]",
        getattr(triton_kernels, f"group_norm_act_{kernel}_kernel"), pointers, (*_GRAD, *_X, *_MODULATION),
        (*_PLACES, "out_frames", "out_height", "out_width", "chunks", "chunk"),
        VARIANTS[variant] | tile.blocks,
    )  # fmt: skip


def _gradients(label: str, variant: str) -> KernelSpec:
    types, modulated = DTYPES[label], variant == ",mod"
    # Missing tensors are never read; others stand for them.
    scale, dscale = (types.modulation, types.modulation) if modulated else (types.weights, "*fp32")
    pointers = {
        "sums": "*fp32", "weight": types.weights, "bias": types.weights, "scale": scale, "means": "*fp32",
        "dvectors": "*fp32", "dscale": dscale, "dshift": dscale,
    }  # fmt: skip
    signature = {f"{name}_ptr": pointer for name, pointer in pointers.items()}
    sizes = ("groups", "group_width", "frames", "statistics", "scales", "rows")
    constants = {"MODULATED": modulated, "BLOCK_C": GROUP_CHANNELS}
    aligned = tuple(signature)
    signature |= dict.fromkeys(("stride_scale_b", "stride_scale_t"), "i64") | dict.fromkeys(sizes, "i32")
    return KernelSpec(
        f"group_gradients[{label}{variant}]", triton_kernels.group_gradients_kernel,
        signature | dict.fromkeys(constants, "constexpr"), constants, num_warps=4, aligned=aligned,
    )  # fmt: skip
