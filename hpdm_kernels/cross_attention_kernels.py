"""Kernels and launchers of :mod:`hpdm_kernels.cross_attention`.

Forward: one program holds ``BLOCK_M`` queries and walks over the keys with the online softmax, so the ``M x N`` scores
never reach memory. Backward: two kernels recompute the scores from the log-sum-exp; one holds queries and walks over
keys (dQ), the other holds keys and walks over queries (dK, dV). Each output element has one writer: no atomics.

Where the rows held are too few to fill the GPU (RIN's read: 768 latents), the walk is cut into ``splits`` ranges whose
partial results are stored in fp32 and then added in a fixed order.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._triton import INTERPRETED, KernelSpec, jit, tl, triton

LOG2E = 1.4426950408889634


@jit
def _load_rows(
    ptr,
    stride,
    start,
    size,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Rows ``start ... start + ROWS - 1`` of a ``[size, WIDTH]`` matrix as ``[ROWS, BLOCK_D]``, zero outside of it."""
    rows = start + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if EVEN and WIDTH == BLOCK_D:
        tile = tl.load(ptrs)
    elif EVEN:
        tile = tl.load(ptrs, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs, mask=(rows < size)[:, None] & (cols < WIDTH)[None, :], other=0.0)
    return tile


@jit
def _store_rows(
    ptr,
    tile,
    row0,
    stride,
    start,
    size,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores ``tile`` as rows ``row0 + start * stride ...`` of a contiguous matrix of ``WIDTH`` columns."""
    rows = start + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + (row0 + rows.to(tl.int64) * stride)[:, None] * WIDTH + cols[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(rows < size)[:, None] & (cols < WIDTH)[None, :])


@jit
def _cross_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [splits, B, M, h, d]
    lse_ptr,  # [splits, B, h, M], base 2
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    batch,
    heads,
    queries,
    keys,
    keys_per_split,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    group = (pid // blocks).to(tl.int64)
    head = group % heads
    sample = group // heads % batch
    first = (group // heads // batch).to(tl.int32) * keys_per_split

    k_ptr += sample * stride_k_b + head * stride_k_h
    v_ptr += sample * stride_v_b + head * stride_v_h
    q_ptr += sample * stride_q_b + head * stride_q_h
    q = _load_rows(q_ptr, stride_q_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(first, tl.minimum(first + keys_per_split, keys), BLOCK_N):
        k = _load_rows(k_ptr, stride_k_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if not EVEN:
            s = tl.where((start_n + tl.arange(0, BLOCK_N) < keys)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # A row whose scores so far all overflowed to -inf has weight 0, not exp2(-inf + inf).
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = _load_rows(v_ptr, stride_v_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    # group counts (split, sample, head); the row of (split, sample, m, head) in out:
    row0 = group // heads * queries * heads + head
    _store_rows(out_ptr, acc / total[:, None], row0, heads, start_m, queries, BLOCK_M, WIDTH, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + group * queries + rows, top + tl.log2(total), mask=rows < queries)


@jit
def _cross_attention_combine_kernel(
    part_ptr,  # [splits, B, M, h, d]
    part_lse_ptr,  # [splits, B, h, M]
    out_ptr,  # [B, M, h, d]
    lse_ptr,  # [B, h, M]
    batch,
    heads,
    queries,
    splits,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    group = (pid // blocks).to(tl.int64)
    start_m = pid % blocks * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    inside = rows < queries
    sample = group // heads
    head = group % heads

    # One pass: the running maximum of the parts' log-sum-exps plays the part of the running maximum of scores.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(0, splits):
        lse = tl.load(part_lse_ptr + (split * batch * heads + group) * queries + rows, mask=inside, other=0.0)
        first_row = (split * batch + sample) * queries * heads + head
        part = _load_rows(part_ptr + first_row * WIDTH, heads * WIDTH, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, False)
        new_top = tl.maximum(top, lse, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        # A part whose scores all overflowed to -inf is 0 / 0 with weight 0.
        part = tl.where((lse == float("-inf"))[:, None], 0.0, part)
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        top = new_top
    row0 = sample * queries * heads + head
    _store_rows(out_ptr, acc / total[:, None], row0, heads, start_m, queries, BLOCK_M, WIDTH, BLOCK_D)
    tl.store(lse_ptr + group * queries + rows, top + tl.log2(total), mask=inside)


@jit
def _cross_attention_bwd_q_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # [B, h, M]
    delta_ptr,  # [B, h, M], written: rowsum(grad * out)
    grad_q_ptr,  # [splits, B, M, h, d], written
    stride_g_b,
    stride_g_h,
    stride_g_m,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    stride_o_b,
    stride_o_h,
    stride_o_m,
    batch,
    heads,
    queries,
    keys,
    keys_per_split,
    scale,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    group = (pid // blocks).to(tl.int64)
    head = group % heads
    sample = group // heads % batch
    split = (group // heads // batch).to(tl.int32)
    first = split * keys_per_split

    rows = start_m + tl.arange(0, BLOCK_M)
    inside = rows < queries
    row_of = (sample * heads + head) * queries + rows
    grad_ptr += sample * stride_g_b + head * stride_g_h
    grad = _load_rows(grad_ptr, stride_g_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
    out_ptr += sample * stride_o_b + head * stride_o_h
    out = _load_rows(out_ptr, stride_o_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    if split == 0:
        tl.store(delta_ptr + row_of, delta, mask=inside)
    lse = tl.load(lse_ptr + row_of, mask=inside, other=0.0)
    q_ptr += sample * stride_q_b + head * stride_q_h
    q = _load_rows(q_ptr, stride_q_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
    k_ptr += sample * stride_k_b + head * stride_k_h
    v_ptr += sample * stride_v_b + head * stride_v_h

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(first, tl.minimum(first + keys_per_split, keys), BLOCK_N):
        k = _load_rows(k_ptr, stride_k_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        v = _load_rows(v_ptr, stride_v_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if not EVEN:
            # Absent keys are rows of zeros, but exp2(-lse) times -delta need not be finite.
            ds = tl.where((start_n + tl.arange(0, BLOCK_N) < keys)[None, :], ds, 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)

    row0 = group // heads * queries * heads + head
    _store_rows(grad_q_ptr, acc * scale, row0, heads, start_m, queries, BLOCK_M, WIDTH, BLOCK_D)


@jit
def _cross_attention_bwd_kv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [B, h, M]
    delta_ptr,  # [B, h, M]
    grad_k_ptr,  # [splits, B, N, h, d], written
    grad_v_ptr,  # [splits, B, N, h, d], written
    stride_g_b,
    stride_g_h,
    stride_g_m,
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    batch,
    heads,
    queries,
    keys,
    queries_per_split,
    scale,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(keys, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % blocks * BLOCK_N
    group = (pid // blocks).to(tl.int64)
    head = group % heads
    sample = group // heads % batch
    first = (group // heads // batch).to(tl.int32) * queries_per_split

    k_ptr += sample * stride_k_b + head * stride_k_h
    v_ptr += sample * stride_v_b + head * stride_v_h
    k = _load_rows(k_ptr, stride_k_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
    v = _load_rows(v_ptr, stride_v_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
    grad_ptr += sample * stride_g_b + head * stride_g_h
    q_ptr += sample * stride_q_b + head * stride_q_h
    lse_ptr += (sample * heads + head) * queries
    delta_ptr += (sample * heads + head) * queries

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start_m in range(first, tl.minimum(first + queries_per_split, queries), BLOCK_M):
        rows = start_m + tl.arange(0, BLOCK_M)
        inside = rows < queries
        q = _load_rows(q_ptr, stride_q_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
        grad = _load_rows(grad_ptr, stride_g_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
        lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        # Transposed scores: keys are rows, so both accumulators are left operands' rows.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[None, :])
        if not EVEN:
            # Absent queries are rows of zeros, but an infinite key or value would make NaN of them.
            p = tl.where(inside[None, :], p, 0.0)
        grad_v = tl.dot(p.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if not EVEN:
            ds = tl.where(inside[None, :], ds, 0.0)
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)

    row0 = group // heads * keys * heads + head
    _store_rows(grad_k_ptr, grad_k * scale, row0, heads, start_n, keys, BLOCK_N, WIDTH, BLOCK_D)
    _store_rows(grad_v_ptr, grad_v, row0, heads, start_n, keys, BLOCK_N, WIDTH, BLOCK_D)


@dataclass(frozen=True)
class Tiling:
    """Block sizes of one kernel: queries, keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, products) -> tilings for head widths up to 32, up to 64, and above. Each is the largest found that needs no
# stack and fits the shared memory of sm_80, sm_90 and sm_100 (Triton 3.9). At width 64 those of 16 bits and of one TF32
# pass run HGMMA on sm_90, and two programs share a multiprocessor where registers allow it.
_TILINGS = {
    ("fwd", "16bit"): (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3)),
    ("fwd", "tf32"): (Tiling(128, 32, 8, 3), Tiling(128, 64, 8, 3), Tiling(128, 32, 8, 2)),
    ("fwd", "tf32x3"): (Tiling(128, 32, 8, 2), Tiling(128, 32, 8, 2), Tiling(32, 32, 8, 2)),
    ("fwd", "ieee"): (Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
    ("bwd_q", "16bit"): (Tiling(128, 64, 8, 2), Tiling(128, 64, 8, 2), Tiling(64, 64, 8, 2)),
    ("bwd_q", "tf32"): (Tiling(128, 32, 8, 2), Tiling(128, 32, 8, 2), Tiling(64, 32, 8, 2)),
    ("bwd_q", "tf32x3"): (Tiling(64, 32, 8, 2), Tiling(32, 64, 8, 2), Tiling(16, 32, 8, 2)),
    ("bwd_q", "ieee"): (Tiling(32, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
    ("bwd_kv", "16bit"): (Tiling(64, 128, 8, 2), Tiling(64, 128, 8, 2), Tiling(64, 64, 8, 2)),
    ("bwd_kv", "tf32"): (Tiling(32, 64, 4, 2), Tiling(32, 64, 4, 2), Tiling(32, 32, 8, 2)),
    ("bwd_kv", "tf32x3"): (Tiling(32, 16, 4, 2), Tiling(32, 32, 4, 2), Tiling(32, 16, 8, 2)),
    ("bwd_kv", "ieee"): (Tiling(32, 32, 8, 2), Tiling(32, 32, 8, 2), Tiling(16, 64, 8, 2)),
}


def products_of(dtype: torch.dtype, precision: str) -> str:
    """The table's second key: 16-bit products are exact in fp32 whatever the precision."""
    return precision if dtype is torch.float32 else "16bit"


def tiling(kernel: str, products: str, block_d: int) -> Tiling:
    """Block sizes of ``kernel`` (``"fwd"``, ``"bwd_q"``, ``"bwd_kv"``); see :data:`_TILINGS`."""
    if INTERPRETED:  # milliseconds per iteration whatever its size: few, large ones
        return Tiling(128, 128, 1, 1)
    return _shipped_tiling(kernel, products, block_d)


def _shipped_tiling(kernel: str, products: str, block_d: int) -> Tiling:
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


def launch_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str) -> tuple[Tensor, Tensor]:
    """``out`` like ``q`` and the log-sum-exp ``[B, h, M]`` in base 2; the last axis of each input has stride 1."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    tile = tiling("fwd", products_of(q.dtype, precision), block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    out, lse = new_rows(q), q.new_empty(batch, heads, queries, dtype=torch.float32)
    part, part_lse = out, lse
    if splits > 1:
        part, part_lse = new_rows(q, torch.float32, splits), lse.new_empty(splits, *lse.shape)
    _cross_attention_fwd_kernel[(blocks * splits,)](
        q, k, v, part, part_lse,
        *_strides(q, k, v),
        batch, heads, queries, keys, per_split * tile.block_n, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=queries % tile.block_m == 0 and keys % tile.block_n == 0, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        block_m = COMBINE_ROWS
        _cross_attention_combine_kernel[(triton.cdiv(queries, block_m) * batch * heads,)](
            part, part_lse, out, lse, batch, heads, queries, splits, WIDTH=width, BLOCK_D=block_d, BLOCK_M=block_m
        )
    return out, lse


def launch_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``; the last axis of each input has stride 1, ``lse`` is contiguous."""
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    block_d = max(16, triton.next_power_of_2(width))
    products = products_of(q.dtype, precision)
    delta = torch.empty_like(lse)

    tile = tiling("bwd_q", products, block_d)
    blocks = triton.cdiv(queries, tile.block_m) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(keys, tile.block_n))
    part_q = new_rows(q, torch.float32 if splits > 1 else q.dtype, splits)
    _cross_attention_bwd_q_kernel[(blocks * splits,)](
        grad, q, k, v, out, lse, delta, part_q,
        *_strides(grad, q, k, v, out),
        batch, heads, queries, keys, per_split * tile.block_n, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=queries % tile.block_m == 0 and keys % tile.block_n == 0, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    grad_q = _sum_parts(part_q, q.dtype)

    tile = tiling("bwd_kv", products, block_d)
    blocks = triton.cdiv(keys, tile.block_n) * batch * heads
    splits, per_split = _grid_split(q.device, blocks, triton.cdiv(queries, tile.block_m))
    part_k, part_v = (new_rows(k, torch.float32 if splits > 1 else k.dtype, splits) for _ in range(2))
    _cross_attention_bwd_kv_kernel[(blocks * splits,)](
        grad, q, k, v, lse, delta, part_k, part_v,
        *_strides(grad, q, k, v),
        batch, heads, queries, keys, per_split * tile.block_m, scale, scale * LOG2E,
        WIDTH=width, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        EVEN=queries % tile.block_m == 0 and keys % tile.block_n == 0, PRECISION=precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return grad_q, _sum_parts(part_k, k.dtype), _sum_parts(part_v, k.dtype)


def _sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    # A reduction over the leading axis adds in a fixed order; one part is returned as it is.
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0).to(dtype)


COMBINE_ROWS = 16

_KERNELS = {
    "fwd": _cross_attention_fwd_kernel,
    "bwd_q": _cross_attention_bwd_q_kernel,
    "bwd_kv": _cross_attention_bwd_kv_kernel,
    "combine": _cross_attention_combine_kernel,
}


def aot_specs() -> list[KernelSpec]:
    """Every kernel at every entry of the table, masked; and unmasked at the head width of the presets (64)."""
    dtypes = [("fp32", p) for p in ("ieee", "tf32x3", "tf32")] + [("bf16", "ieee"), ("fp16", "ieee")]
    specs = []
    for kernel, (dtype, precision), block_d in product(("fwd", "bwd_q", "bwd_kv"), dtypes, (16, 32, 64, 128)):
        tile = _shipped_tiling(kernel, precision if dtype == "fp32" else "16bit", block_d)
        for even in (False, True) if block_d == 64 else (False,):
            constexprs = {
                "WIDTH": block_d, "BLOCK_D": block_d, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                "EVEN": even, "PRECISION": precision,
            }  # fmt: skip
            label = f"{dtype},{precision},d{block_d}" + (",even" if even else "")
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
            always_fp32 = name.removesuffix("_ptr") in ("lse", "delta", "part", "part_lse")
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
