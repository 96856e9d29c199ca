"""Launches the attention kernels: block sizes, splits of the loop over keys or queries, and partial results."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hpdm_kernels._layout import dense_rows
from hpdm_kernels._triton import INTERPRETED, launch_grid, triton
from hpdm_kernels.attention import triton_kernels as kernels
from hpdm_kernels.attention.block_sizes import (
    COMBINE_ROWS,
    KEY_PAD,
    WHOLE_KEYS,
    WHOLE_QUERIES,
    Tiling,
    backward_precision,
    tiling,
)
from hpdm_kernels.attention.layout import empty_heads

LOG2E = 1.4426950408889634
SPLIT_STEPS = 4
"""What a program of a split loop costs beyond its steps, in steps: rows that stay in registers, partial results."""


@functools.lru_cache(maxsize=4096)
def split_loop(programs: int, steps: int, slots: int, extra: int = SPLIT_STEPS) -> tuple[int, int]:
    """Splits a loop over ``steps`` blocks into ranges. Returns the number of ranges and the blocks per range.

    With ``slots`` programs running at a time, a few programs more than a multiple of that take as long as one multiple
    more. The split is the one with the fewest steps from the first program's start to the last one's end.

    Args:
        programs: programs without a split.
        steps: length of the loop.
        slots: programs that the GPU runs at a time.
        extra: what a program of a split loop costs beyond its steps, in steps; also the shortest range.
    """

    def cost(splits: int) -> int:
        return triton.cdiv(programs * splits, slots) * (triton.cdiv(steps, splits) + extra * (splits > 1))

    most = min(steps // max(1, extra), triton.cdiv(4 * slots, programs))
    splits = min(range(1, max(1, most) + 1), key=cost)
    per_split = triton.cdiv(steps, splits)
    return triton.cdiv(steps, per_split), per_split


def _grid_split(device: torch.device, programs: int, steps: int, per_processor: int) -> tuple[int, int]:
    """:func:`split_loop` on ``device``, whose multiprocessors hold ``per_processor`` programs at a time."""
    if INTERPRETED:  # as if 8 programs ran at a time, so that small tests split their loops too
        return split_loop(programs, steps, slots=8, extra=0)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return split_loop(programs, steps, processors * per_processor)


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
    whole = _whole(queries, keys, width, block_d, key_mask)
    tile = tiling("fwd", q.dtype, precision, block_d, q.device, whole)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n), tile.programs)
    out, lse = empty_heads(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    part, part_lse = out, lse
    if splits > 1:
        part, part_lse = empty_heads(q, torch.float32, splits), lse.new_empty(splits, *lse.shape)
    kernels.cross_attention_fwd_kernel[launch_grid(blocks, splits)](
        q, k, v, bias, part, part_lse,
        *_strides(q, k, v), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_n, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, **tile.constexprs,
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
    results: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``dq [B, h, M, d]``, ``dk`` and ``dv`` ``[B, h, N, d]``.

    ``k`` and ``v`` may be a subset of the keys and values, as long as ``out`` and ``lse`` are the results for all keys.

    Args:
        grad: gradient of ``out``, ``[B, h, M, d]``.
        out, lse: results of :func:`forward`, which has the other arguments.
        results: where to write the gradients: tensors of their shapes in the memory of :func:`empty_heads`, or parts of
            a packed gradient (:mod:`hpdm_kernels.attention.packed`); ``None``: into new tensors.
    """
    dq, dk, dv = results or (empty_heads(q), empty_heads(k), empty_heads(k))
    grad, q, k, v, out = map(dense_rows, (grad, q, k, v, out))
    lse, bias = lse.contiguous(), _bias_of(key_mask)
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    precision = backward_precision(precision, block_d)
    delta = torch.empty_like(lse)

    whole = _whole(queries, keys, width, block_d, key_mask)
    tile = tiling("bwd_q", q.dtype, precision, block_d, q.device, whole)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n), tile.programs)
    # The kernel writes rows of h heads one after the other.
    apart = dq if _row_heads(dq) == heads else empty_heads(q)
    part_q = _parts(apart, splits)
    kernels.cross_attention_bwd_q_kernel[launch_grid(blocks, splits)](
        grad, q, k, v, bias, out, lse, delta, part_q,
        *_strides(grad, q, k, v, out), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_n, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, **tile.constexprs,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    _sum_parts(part_q, apart)
    if apart is not dq:
        dq.copy_(apart)

    tile = tiling("bwd_kv", q.dtype, precision, block_d, q.device, whole)
    blocks = triton.cdiv(keys, tile.block_n) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(queries, tile.block_m), tile.programs)
    part_k, part_v = _parts(dk, splits), _parts(dv, splits)
    kernels.cross_attention_bwd_kv_kernel[launch_grid(blocks, splits)](
        grad, q, k, v, bias, lse, delta, part_k, part_v,
        *_strides(grad, q, k, v), 0 if bias is None else bias.stride(0),
        batch, heads, queries, keys, per_split * tile.block_m, _row_heads(part_k), scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, **tile.constexprs,
        EVEN=_even(queries, keys, key_mask, tile), PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    _sum_parts(part_k, dk)
    _sum_parts(part_v, dv)
    return dq, dk, dv


def _whole(queries: int, keys: int, width: int, block_d: int, key_mask: Tensor | None) -> bool:
    """Whether the tilings for whole blocks serve: all blocks are full and no key is hidden."""
    return key_mask is None and width == block_d and queries % WHOLE_QUERIES == keys % WHOLE_KEYS == 0


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


def _parts(result: Tensor, splits: int) -> Tensor:
    """Where ``splits`` ranges of a loop write what adds up to ``result [B, h, rows, d]``: ``[splits, B, h, rows, d]``.

    A single range writes the result itself.
    """
    return result[None] if splits == 1 else empty_heads(result, torch.float32, splits)


def _row_heads(parts: Tensor) -> int:
    """Distance of the rows of ``parts [..., h, rows, d]`` in memory, in heads."""
    return parts.stride(-2) // parts.shape[-1]


def _sum_parts(parts: Tensor, result: Tensor) -> None:
    """Writes the sum of ``[splits, B, h, rows, d]`` over the splits, in a fixed order, into ``result``."""
    if parts.shape[0] == 1:
        return
    # A reduction over the leading axis adds in a fixed order. Rows before heads: the order of the parts' memory.
    parts, result = parts.transpose(-2, -3), result.transpose(-2, -3)
    if parts.dtype == result.dtype:
        torch.sum(parts, dim=0, out=result)
    else:
        result.copy_(parts.sum(dim=0))
