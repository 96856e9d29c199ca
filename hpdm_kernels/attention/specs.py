"""The attention kernels in every configuration that is compiled ahead of time."""

from __future__ import annotations

from itertools import product
from typing import Any

from hpdm_kernels._triton import SHARED_MEMORY_LIMITS, KernelSpec
from hpdm_kernels.attention import triton_kernels
from hpdm_kernels.attention.block_sizes import COMBINE_ROWS, Gpu, Tiling, backward_precision, gpu_tiling

_KERNELS = {
    "fwd": triton_kernels.cross_attention_fwd_kernel,
    "bwd_q": triton_kernels.cross_attention_bwd_q_kernel,
    "bwd_kv": triton_kernels.cross_attention_bwd_kv_kernel,
    "combine": triton_kernels.cross_attention_combine_kernel,
}

BLOCKS_D = (16, 32, 64, 128, 256)
"""Head widths, rounded up to a power of two."""


def aot_specs() -> list[KernelSpec]:
    """Every kernel with every entry of the table of block sizes, with partial blocks and with hidden keys.

    Head width 64, which the presets use, also with full blocks.
    """
    dtypes = [("fp32", p) for p in ("ieee", "tf32x3", "tf32")] + [("bf16", "ieee"), ("fp16", "ieee")]
    specs = []
    for kernel, (dtype, precision), block_d in product(("fwd", "bwd_q", "bwd_kv"), dtypes, BLOCKS_D):
        if kernel != "fwd" and backward_precision(precision, block_d) != precision:
            continue
        for even, masked in ((False, False), (False, True), *([(True, False)] if block_d == 64 else [])):
            for tile, targets in _tilings(kernel, precision if dtype == "fp32" else "16bit", block_d, even).items():
                width = block_d if even else block_d * 3 // 4
                constexprs = {
                    "WIDTH": width, "BLOCK_D": block_d, **tile.constexprs, "EVEN": even, "PRECISION": precision,
                }  # fmt: skip
                if not masked:
                    constexprs["bias_ptr"] = None
                label = f"{dtype},{precision},d{width}{',mask' * masked}"
                specs.append(_spec(kernel, label, dtype, constexprs, tile.num_warps, tile.num_stages, targets))
    for dtype, block_d in product(("fp32", "bf16", "fp16"), BLOCKS_D):
        constexprs = {"WIDTH": block_d, "BLOCK_D": block_d, "BLOCK_M": COMBINE_ROWS}
        specs.append(_spec("combine", f"{dtype},d{block_d}", dtype, constexprs, 4, 2))
    return specs


def _tilings(kernel: str, products: str, block_d: int, whole: bool) -> dict[Tiling, tuple[str, ...]]:
    """The different block sizes of a kernel, each with the GPUs that have it: none if all of them have the same."""
    by_tiling: dict[Tiling, tuple[str, ...]] = {}
    for target, limit in SHARED_MEMORY_LIMITS.items():
        tile = gpu_tiling(kernel, products, block_d, Gpu(int(target.removeprefix("sm_")), limit), whole)
        by_tiling[tile] = (*by_tiling.get(tile, ()), target)
    return by_tiling if len(by_tiling) > 1 else dict.fromkeys(by_tiling, ())


def _spec(
    kernel: str,
    label: str,
    dtype: str,
    constexprs: dict[str, Any],
    num_warps: int,
    num_stages: int,
    targets: tuple[str, ...] = (),
) -> KernelSpec:
    fn = _KERNELS[kernel]
    signature, aligned = {}, []
    for name in fn.arg_names:
        if name in constexprs:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            always_fp32 = name.removesuffix("_ptr") in ("lse", "delta", "part", "part_lse", "bias")
            signature[name] = "*fp32" if always_fp32 else f"*{dtype}"
            aligned.append(name)
        elif name.startswith("stride_"):
            signature[name] = "i32"
            aligned.append(name)
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    return KernelSpec(
        f"cross_attention_{kernel}[{label}]", fn, signature, constexprs, num_warps, num_stages, tuple(aligned), targets
    )
