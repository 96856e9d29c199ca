"""Launches the attention kernels: block sizes, splits of the loop over keys or queries, and partial results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels._layout import dense_rows
from hpdm_kernels._triton import INTERPRETED, launch_grid, triton
from hpdm_kernels.attention import triton_kernels as kernels
from hpdm_kernels.attention.layout import empty_heads

LOG2E = 1.4426950408889634
COMBINE_ROWS = 16
KEY_PAD = 128
"""A multiple of every ``block_n``."""


class Tiling(NamedTuple):
    """Block sizes of one kernel: queries, keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, products) -> tilings for head widths up to 32, up to 64, up to 128, and up to 256. Each is the largest tested
# tiling that uses no stack and fits the shared memory of sm_80, sm_90 and sm_100, with and without hidden keys (Triton
# 3.9). 3xTF32 has none for the backward at width 256: see `backward_precision`.
# On sm_90 all products of 16 bits and of one TF32 pass run on HGMMA up to width 128. These run on HMMA instead:
# - at width 256 one TF32 pass, and 16 bits in bwd_kv: HGMMA needs blocks of 64 rows, which spill registers on sm_80 or
#   sm_90, or need too much shared memory on sm_80;
# - 3xTF32 at width 128 and above, and bwd_kv at width 64: HGMMA needs blocks of 64 rows, which spill registers on sm_80
#   or sm_90;
# - 3xTF32 in bwd_q at every width: blocks of 64 by 16 would fit on HGMMA, but ptxas 12.8.93 (Triton 3.6 and 3.7.1)
#   gives them shared-memory addresses from unset registers. ptxas 12.9.86, 13.1.80 and 13.4.59 do not.
_TILINGS = {
    ("fwd", "16bit"): (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(64, 64, 8, 2)),
    ("fwd", "tf32"): (Tiling(128, 32, 8, 3), Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 2), Tiling(32, 32, 8, 2)),
    ("fwd", "tf32x3"): (Tiling(128, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2), Tiling(16, 32, 8, 2)),
    ("fwd", "ieee"): (Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(16, 32, 8, 2), Tiling(16, 32, 8, 2)),
    ("bwd_q", "16bit"): (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 2)),
    ("bwd_q", "tf32"): (Tiling(128, 32, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2)),
    ("bwd_q", "tf32x3"): (Tiling(16, 64, 4, 2), Tiling(32, 64, 8, 2), Tiling(16, 32, 8, 2)),
    ("bwd_q", "ieee"): (Tiling(32, 32, 8, 2), Tiling(32, 32, 8, 2), Tiling(64, 16, 8, 2), Tiling(32, 32, 8, 2)),
    ("bwd_kv", "16bit"): (Tiling(64, 128, 8, 2), Tiling(64, 128, 8, 2), Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 2)),
    ("bwd_kv", "tf32"): (Tiling(32, 64, 4, 2), Tiling(32, 64, 8, 2), Tiling(16, 64, 4, 1), Tiling(16, 32, 8, 2)),
    ("bwd_kv", "tf32x3"): (Tiling(16, 64, 4, 2), Tiling(32, 16, 8, 2), Tiling(32, 16, 8, 2)),
    ("bwd_kv", "ieee"): (Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2), Tiling(16, 64, 8, 2), Tiling(16, 32, 8, 2)),
}


def gpu_tiling(kernel: str, products: str, block_d: int) -> Tiling:
    """Block sizes on a GPU of ``kernel`` (``"fwd"``, ``"bwd_q"``, ``"bwd_kv"``); see :data:`_TILINGS`.

    Args:
        kernel: the first part of the table's key.
        products: the second part: ``"16bit"``, or the precision of fp32 products.
        block_d: head width, rounded up to a power of two.
    """
    return _TILINGS[kernel, products][(block_d > 32) + (block_d > 64) + (block_d > 128)]


def backward_precision(precision: str, block_d: int) -> str:
    """The precision in which the backward computes the fp32 products that the caller wants in ``precision``.

    3xTF32 keeps three parts of its operands in registers, too many for head widths above 128 in any block size. These
    products are computed in fp32, which is slower and rounds less.
    """
    return "ieee" if precision == "tf32x3" and block_d > 128 else precision


def _tiling(kernel: str, dtype: torch.dtype, precision: str, block_d: int) -> Tiling:
    if INTERPRETED:  # the interpreter's cost is per iteration, whatever its size: large blocks are fastest
        return Tiling(128, 128, 1, 1)
    return gpu_tiling(kernel, precision if dtype is torch.float32 else "16bit", block_d)


def _grid_split(device: torch.device, programs: int, steps: int) -> tuple[int, int]:
    """Splits a loop over ``steps`` blocks into ranges. Returns the number of ranges and the blocks per range.

    Two programs per multiprocessor hide each other's latency. A range of fewer than four blocks would mostly load the
    rows that stay in registers during its loop. No range is empty.
    """
    # The interpreter has no multiprocessors. Assuming 4 makes small tests split their loops too.
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    shortest = 1 if INTERPRETED else 4
    splits = max(1, min(2 * processors // programs, steps // shortest))
    per_split = triton.cdiv(steps, splits)
    return triton.cdiv(steps, per_split), per_split


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of batch, head and row of each ``[B, h, rows, d]``."""
    return [n for t in tensors for n in t.stride()[:3]]


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out [B, h, M, d]`` like ``q`` and the base-2 log-sum-exp, fp32 ``[B, h, M]``.

    Args:
        q: ``[B, h, M, d]``.
        k, v: ``[B, h, N, d]``.
        scale: factor of the scores.
        precision: how fp32 products are computed, ``"ieee"``, ``"tf32x3"`` or ``"tf32"``.
        key_mask: ``[B, N]`` bool, or ``None``.
    """
    (q, k, v), bias = map(dense_rows, (q, k, v)), _bias_of(key_mask)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    tile = _tiling("fwd", q.dtype, precision, block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    out, lse = empty_heads(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    part, part_lse = out, lse
    if splits > 1:
        part, part_lse = empty_heads(q, torch.float32, splits), lse.new_empty(splits, *lse.shape)
    kernels.cross_attention_fwd_kernel[launch_grid(blocks, splits)](
        q, k, v, bias, part, part_lse,
        *_strides(q, k, v), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_n, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        block_m = COMBINE_ROWS
        kernels.cross_attention_combine_kernel[launch_grid(triton.cdiv(queries, block_m), batch, heads)](
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
    """Gradients ``dq [B, h, M, d]``, ``dk`` and ``dv`` ``[B, h, N, d]``.

    ``k`` and ``v`` may be a subset of the keys and values, as long as ``out`` and ``lse`` are the results for all keys.

    Args:
        grad: gradient of ``out``, ``[B, h, M, d]``.
        out, lse: results of :func:`forward`, which has the other arguments.
    """
    grad, q, k, v, out = map(dense_rows, (grad, q, k, v, out))
    lse, bias = lse.contiguous(), _bias_of(key_mask)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    precision = backward_precision(precision, block_d)
    delta = torch.empty_like(lse)

    tile = _tiling("bwd_q", q.dtype, precision, block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    part_q = empty_heads(q, torch.float32 if splits > 1 else q.dtype, splits)
    kernels.cross_attention_bwd_q_kernel[launch_grid(blocks, splits)](
        grad, q, k, v, bias, out, lse, delta, part_q,
        *_strides(grad, q, k, v, out), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_n, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    dq = _sum_parts(part_q, q.dtype)

    tile = _tiling("bwd_kv", q.dtype, precision, block_d)
    blocks = triton.cdiv(keys, tile.block_n) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(queries, tile.block_m))
    part_k, part_v = (empty_heads(k, torch.float32 if splits > 1 else k.dtype, splits) for _ in range(2))
    kernels.cross_attention_bwd_kv_kernel[launch_grid(blocks, splits)](
        grad, q, k, v, bias, lse, delta, part_k, part_v,
        *_strides(grad, q, k, v), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_m, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return dq, _sum_parts(part_k, k.dtype), _sum_parts(part_v, k.dtype)


def _even(queries: int, keys: int, key_mask: Tensor | None, tile: Tiling) -> bool:
    """Whether all blocks are full and no key is hidden, so that the kernel needs no masks."""
    return key_mask is None and queries % tile.block_m == 0 and keys % tile.block_n == 0


def _bias_of(key_mask: Tensor | None) -> Tensor | None:
    """The mask to be added to the scores: fp32 ``[B, N rounded up]``, 0, or -inf where a key is hidden or absent.

    ``N`` is rounded up so that loading a block needs no mask. The kernels then need one addition per score; reading the
    bool mask, or loading this one with a mask, would take too many registers.
    """
    if key_mask is None:
        return None
    batch, keys = key_mask.shape
    shape = (batch, triton.cdiv(keys, KEY_PAD) * KEY_PAD)
    bias = torch.full(shape, -torch.inf, dtype=torch.float32, device=key_mask.device)
    bias[:, :keys].masked_fill_(key_mask, 0.0)
    return bias


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of ``[splits, B, h, rows, d]`` over the splits, in a fixed order."""
    if parts.shape[0] == 1:
        return parts[0]
    # A reduction over the leading axis adds in a fixed order; over contiguous memory it keeps the layout.
    return parts.transpose(-2, -3).sum(dim=0).to(dtype).transpose(-2, -3)
