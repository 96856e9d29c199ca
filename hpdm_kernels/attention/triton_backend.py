"""Launches the kernels of ``cross_attention_kernels``: block sizes, splits and partial results."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._triton import INTERPRETED, KernelSpec, triton
from hpdm_kernels.attention import triton_kernels as kernels

LOG2E = 1.4426950408889634
COMBINE_ROWS = 16
KEY_PAD = 128
"""A multiple of every ``block_n``."""


@dataclass(frozen=True)
class _Tiling:
    """Block sizes of one kernel: queries, keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, products) -> tilings for head widths up to 32, up to 64, and above. Each is the largest found that needs no
# stack and fits the shared memory of sm_80, sm_90 and sm_100, with hidden keys and without (Triton 3.9). All of 16 bits
# and of one TF32 pass run HGMMA on sm_90. Of 3xTF32, width 128 and bwd_kv at width 64 run HMMA: blocks of the 64 rows
# that HGMMA wants spill there, on sm_80 if not on sm_90.
_TILINGS = {
    ("fwd", "16bit"): (_Tiling(128, 64, 8, 3), _Tiling(128, 64, 8, 3), _Tiling(128, 64, 8, 3)),
    ("fwd", "tf32"): (_Tiling(128, 32, 8, 3), _Tiling(128, 64, 8, 3), _Tiling(128, 32, 8, 2)),
    ("fwd", "tf32x3"): (_Tiling(128, 32, 8, 2), _Tiling(64, 32, 8, 2), _Tiling(32, 32, 8, 2)),
    ("fwd", "ieee"): (_Tiling(64, 32, 8, 2), _Tiling(64, 32, 8, 2), _Tiling(16, 32, 8, 2)),
    ("bwd_q", "16bit"): (_Tiling(128, 64, 8, 3), _Tiling(128, 64, 8, 2), _Tiling(64, 64, 8, 2)),
    ("bwd_q", "tf32"): (_Tiling(128, 32, 8, 2), _Tiling(128, 32, 8, 2), _Tiling(64, 32, 8, 2)),
    ("bwd_q", "tf32x3"): (_Tiling(64, 16, 8, 2), _Tiling(64, 16, 8, 1), _Tiling(16, 32, 8, 2)),
    ("bwd_q", "ieee"): (_Tiling(32, 32, 8, 2), _Tiling(32, 32, 8, 2), _Tiling(64, 16, 8, 2)),
    ("bwd_kv", "16bit"): (_Tiling(64, 128, 8, 2), _Tiling(64, 128, 8, 2), _Tiling(64, 64, 8, 2)),
    ("bwd_kv", "tf32"): (_Tiling(32, 64, 4, 2), _Tiling(32, 64, 8, 2), _Tiling(16, 64, 4, 1)),
    ("bwd_kv", "tf32x3"): (_Tiling(16, 64, 4, 2), _Tiling(32, 16, 8, 2), _Tiling(32, 16, 8, 2)),
    ("bwd_kv", "ieee"): (_Tiling(64, 32, 8, 2), _Tiling(32, 32, 8, 2), _Tiling(16, 64, 8, 2)),
}


def _products_of(dtype: torch.dtype, precision: str) -> str:
    """The table's second key."""
    return precision if dtype is torch.float32 else "16bit"


def _tiling(kernel: str, products: str, block_d: int) -> _Tiling:
    """Block sizes of ``kernel`` (``"fwd"``, ``"bwd_q"``, ``"bwd_kv"``); see :data:`_TILINGS`."""
    if INTERPRETED:  # milliseconds per iteration whatever its size: few, large ones
        return _Tiling(128, 128, 1, 1)
    return _shipped_tiling(kernel, products, block_d)


def _shipped_tiling(kernel: str, products: str, block_d: int) -> _Tiling:
    return _TILINGS[kernel, products][(block_d > 32) + (block_d > 64)]


def _grid_split(device: torch.device, programs: int, steps: int) -> tuple[int, int]:
    """Into how many ranges the walk over ``steps`` blocks is cut, and the blocks of one range.

    Two programs per multiprocessor hide each other's waits; a range of fewer than four blocks would spend its time on
    loading the rows it holds. No range is empty.
    """
    # Interpreted, the count is made up so that small tests cut their walks as well.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    shortest = 1 if INTERPRETED else 4
    splits = max(1, min(2 * processors // programs, steps // shortest))
    per_split = triton.cdiv(steps, splits)
    return triton.cdiv(steps, per_split), per_split


def _strides(*tensors: Tensor) -> list[int]:
    return [n for t in tensors for n in t.stride()[:3]]


def new_rows(like: Tensor, dtype: torch.dtype | None = None, splits: int | None = None) -> Tensor:
    """An empty ``[B, h, rows, d]`` laid out as ``[B, rows, h, d]``: merging the heads afterwards is a view."""
    batch, heads, rows, width = like.shape
    lead = (batch,) if splits is None else (splits, batch)
    return like.new_empty(*lead, rows, heads, width, dtype=dtype).transpose(-2, -3)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out`` like ``q`` and the log-sum-exp ``[B, h, M]`` in base 2."""
    (q, k, v), bias = map(_unit_stride, (q, k, v)), _bias_of(key_mask)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    tile = _tiling("fwd", _products_of(q.dtype, precision), block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    out, lse = new_rows(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    part, part_lse = out, lse
    if splits > 1:
        part, part_lse = new_rows(q, torch.float32, splits), lse.new_empty(splits, *lse.shape)
    kernels.cross_attention_fwd_kernel[(blocks * splits,)](
        q, k, v, bias, part, part_lse,
        *_strides(q, k, v), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_n, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        block_m = COMBINE_ROWS
        kernels.cross_attention_combine_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
            part, part_lse, out, lse, batch, heads, queries, splits, WIDTH=width, BLOCK_D=block_d, BLOCK_M=block_m
        )
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``. Those of some of the keys need ``out`` and ``lse`` of all of them."""
    grad, q, k, v, out = map(_unit_stride, (grad, q, k, v, out))
    lse, bias = lse.contiguous(), _bias_of(key_mask)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    products = _products_of(q.dtype, precision)
    delta = torch.empty_like(lse)

    tile = _tiling("bwd_q", products, block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    part_q = new_rows(q, torch.float32 if splits > 1 else q.dtype, splits)
    kernels.cross_attention_bwd_q_kernel[(blocks * splits,)](
        grad, q, k, v, bias, out, lse, delta, part_q,
        *_strides(grad, q, k, v, out), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_n, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    grad_q = _sum_parts(part_q, q.dtype)

    tile = _tiling("bwd_kv", products, block_d)
    blocks = triton.cdiv(keys, tile.block_n) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(queries, tile.block_m))
    part_k, part_v = (new_rows(k, torch.float32 if splits > 1 else k.dtype, splits) for _ in range(2))
    kernels.cross_attention_bwd_kv_kernel[(blocks * splits,)](
        grad, q, k, v, bias, lse, delta, part_k, part_v,
        *_strides(grad, q, k, v), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_m, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return grad_q, _sum_parts(part_k, k.dtype), _sum_parts(part_v, k.dtype)


def _even(queries: int, keys: int, key_mask: Tensor | None, tile: _Tiling) -> bool:
    """Whether every block is whole and every key may be read, so that a kernel without masks will do."""
    return key_mask is None and queries % tile.block_m == 0 and keys % tile.block_n == 0


def _bias_of(key_mask: Tensor | None) -> Tensor | None:
    """What hides keys when added to their scores: ``[B, N]``, rounded up so that no load of a block needs a mask.

    An addition is all it costs; kernels that read the mask itself, or this with a mask, need too many registers.
    """
    if key_mask is None:
        return None
    batch, keys = key_mask.shape
    bias = torch.full((batch, triton.cdiv(keys, KEY_PAD) * KEY_PAD), -torch.inf, device=key_mask.device)
    bias[:, :keys].masked_fill_(key_mask, 0.0)
    return bias


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0]
    # A reduction over the leading axis adds in a fixed order; over contiguous memory it keeps the layout.
    return parts.transpose(-2, -3).sum(dim=0).to(dtype).transpose(-2, -3)


def _unit_stride(x: Tensor) -> Tensor:
    """The kernels read rows of adjacent elements; any other stride of the last axis costs a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


_KERNELS = {
    "fwd": kernels.cross_attention_fwd_kernel,
    "bwd_q": kernels.cross_attention_bwd_q_kernel,
    "bwd_kv": kernels.cross_attention_bwd_kv_kernel,
    "combine": kernels.cross_attention_combine_kernel,
}


def aot_specs() -> list[KernelSpec]:
    """Every kernel at every entry of the table, for blocks that are not whole and for hidden keys; and for whole blocks
    at head width 64, the presets'.
    """
    dtypes = [("fp32", p) for p in ("ieee", "tf32x3", "tf32")] + [("bf16", "ieee"), ("fp16", "ieee")]
    specs = []
    for kernel, (dtype, precision), block_d in product(("fwd", "bwd_q", "bwd_kv"), dtypes, (16, 32, 64, 128)):
        tile = _shipped_tiling(kernel, precision if dtype == "fp32" else "16bit", block_d)
        for even, masked in ((False, False), (False, True), *([(True, False)] if block_d == 64 else [])):
            width = block_d if even else block_d * 3 // 4
            constexprs = {
                "WIDTH": width, "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                "EVEN": even, "PRECISION": precision,
            }  # fmt: skip
            if not masked:
                constexprs["bias_ptr"] = None
            label = f"{dtype},{precision},d{width}{',mask' * masked}"
            specs.append(_spec(kernel, label, dtype, constexprs, tile.num_warps, tile.num_stages))
    for dtype, block_d in product(("fp32", "bf16", "fp16"), (16, 32, 64, 128)):
        constexprs = {"WIDTH": block_d, "BLOCK_D": block_d, "BLOCK_M": COMBINE_ROWS}
        specs.append(_spec("combine", f"{dtype},d{block_d}", dtype, constexprs, 4, 2))
    return specs


def _spec(
    kernel: str, label: str, dtype: str, constexprs: dict[str, Any], num_warps: int, num_stages: int
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
        f"cross_attention_{kernel}[{label}]", fn, signature, constexprs, num_warps, num_stages, tuple(aligned)
    )
