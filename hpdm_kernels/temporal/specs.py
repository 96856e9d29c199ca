"""The kernels of temporal attention in configurations of every kind, to be compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.temporal import triton_kernels
from hpdm_kernels.temporal.block_sizes import tile

SIZES = (
    (4, 64), (8, 64), (16, 64), (4, 128), (4, 192), (4, 256), (5, 256), (16, 256), (16, 16), (64, 64),
)  # fmt: skip
"""Frames and widths of heads: those of the published U-Nets, a width that is no power of two, the largest tiles."""
DTYPES = {"fp32": ("*fp32", "*fp32"), "bf16": ("*bf16", "*bf16"), "fp16": ("*fp16", "*fp16")}
_DTYPES = DTYPES | {"bf16+fp32": ("*bf16", "*fp32")}
"""Of the projection and of the tables, which under autocast have the parameters' dtype."""


def aot_specs() -> list[KernelSpec]:
    """Both kernels for every size and dtype; under autocast for the first size alone."""
    return list(_specs())


def _specs() -> Iterator[KernelSpec]:
    strides = {"fwd": ("qkv",), "bwd": ("grad", "qkv")}
    for label, (data, table) in _DTYPES.items():
        for frames, width in SIZES[:1] if "+" in label else SIZES:
            for direction, tensors in strides.items():
                kernel = getattr(triton_kernels, f"temporal_attention_{direction}_kernel")
                backward = direction == "bwd"
                names = ("grad", "qkv", "rel_k", "rel_v", "dqkv") if backward else ("qkv", "rel_k", "rel_v", "out")
                signature = {f"{name}_ptr": table if name.startswith("rel") else data for name in names}
                if backward:
                    signature["sums_ptr"] = "*fp32"
                pointers = tuple(signature)
                steps = tuple(f"stride_{name}_{axis}" for name in tensors for axis in "btn")
                signature |= dict.fromkeys(steps, "i64")
                counts = (
                    "frames",
                    "positions",
                    "heads",
                    "farthest",
                    *(("chunks", "chunk") if backward else ("blocks",)),
                )
                signature |= dict.fromkeys(counts, "i32")
                signature |= dict.fromkeys((*(("scale",) if backward else ()), "scale_log2"), "fp32")
                sizes = tile(frames, width, backward)
                constexprs = {"WIDTH": width, **sizes.blocks}
                signature |= dict.fromkeys(constexprs, "constexpr")
                yield KernelSpec(
                    f"temporal_attention_{direction}[{label},T={frames},d={width}]", kernel, signature, constexprs,
                    num_warps=sizes.num_warps, aligned=(*pointers, *steps),
                )  # fmt: skip
