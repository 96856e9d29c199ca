"""The attention kernels, launched by :mod:`hpdm_kernels.attention.triton_backend`.

Forward: a program keeps ``BLOCK_M`` queries and loops over the keys with the online softmax, so the ``M x N`` scores
never reach memory. Backward: two kernels recompute the weights from the scores and the log-sum-exp. One keeps queries
and loops over keys (dq), the other keeps keys and loops over queries (dk, dv). One program writes each output element:
there are no atomics.

The loop may be split into ranges, one program each ("splits"), with fp32 partial results. The combine kernel merges
those of the forward by their log-sum-exps; those of the backward are added. Both happen in a fixed order.

A mask may hide keys. A query whose scores are all -inf, hidden or not, gives zeros, as in PyTorch's attention.

Products of one TF32 pass take rounded operands, so rows go through registers between global and shared memory:

- ``AHEAD``: the loop loads the next block into registers while it computes. Asynchronous copies to shared memory would
  have to be read back for rounding, and written again.
- ``PARTS``: sm_90 and newer read fp32 operands only with the summed axis contiguous in shared memory, so a block
  ``[N, D]`` that is summed over ``N`` is transposed on the way. A thread holds four adjacent columns of ``PARTS`` rows
  that are ``N / PARTS`` apart. :func:`_interleave` renumbers rows so that these become adjacent, and one store writes
  them, and columns so that the stores of a warp hit different banks. The sum does not depend on the order of rows, as
  long as both operands have the same, and the columns of the result are put back in order after the loop.

In the comments on arguments, ``[B, h, M, d]*`` is a tensor whose strides of ``B``, ``h`` and ``M`` are arguments, too,
and whose last axis is contiguous; tensors without ``*`` are contiguous. ``row_heads`` is ``h``, or more if a gradient
is part of a packed one; its pointer is that of the part.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._tf32 import as_operand
from hpdm_kernels._triton import jit, kernel, tl


def _for_all_sizes(fn):
    """A kernel with one variant for all sizes: only the strides, which tell how wide loads may be, make others."""
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return kernel(specialize=[name for name in names if name.startswith("stride_")])(fn)


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
    """Loads rows ``start`` to ``start + ROWS - 1`` of a ``[size, WIDTH]`` matrix as ``[ROWS, BLOCK_D]``, zero outside.

    Rows are ``stride`` elements apart. ``EVEN``: all of these rows are inside the matrix.
    """
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
def _ahead(start, stop, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """The start of the block after the one at ``start``, for a load that may be in vain.

    After the last block of whole ones it is that block again; rows of partial blocks are masked.
    """
    return tl.minimum(start + ROWS, stop - ROWS) if EVEN else start + ROWS


@jit
def _order(SIZE: tl.constexpr, PARTS: tl.constexpr):
    """The rows ``[SIZE]`` in the order of :func:`_interleave_rows`."""
    rows = tl.arange(0, SIZE)
    if PARTS > 1:
        rows = rows % PARTS * (SIZE // PARTS) + rows // PARTS
    return rows


@jit
def _interleave_rows(x, PARTS: tl.constexpr):
    """``x [N, D]`` with row ``part * N / PARTS + i`` moved to ``i * PARTS + part``."""
    if PARTS > 1:
        ROWS: tl.constexpr = x.shape[0] // PARTS
        parts = tl.reshape(x, (PARTS, ROWS, x.shape[1]))
        x = tl.reshape(tl.permute(parts, (1, 0, 2)), (x.shape[0], x.shape[1]))
    return x


@jit
def _interleave(x, PARTS: tl.constexpr):
    """``x [N, D]`` with rows as :func:`_interleave_rows` has them, and column ``4 * i + j`` moved to ``j * D / 4 + i``.

    ``PARTS`` 0: ``x`` as it is.
    """
    if PARTS > 0:
        ROWS: tl.constexpr = x.shape[0] // PARTS
        COLS: tl.constexpr = x.shape[1] // 4
        parts = tl.reshape(x, (PARTS, ROWS, COLS, 4))
        x = tl.reshape(tl.permute(parts, (1, 0, 3, 2)), (x.shape[0], x.shape[1]))
    return x


@jit
def _columns_in_order(x, PARTS: tl.constexpr):
    """``x [M, D]`` with its columns moved back from where :func:`_interleave` put them."""
    if PARTS > 0:
        COLS: tl.constexpr = x.shape[1] // 4
        x = tl.reshape(tl.permute(tl.reshape(x, (x.shape[0], 4, COLS)), (0, 2, 1)), (x.shape[0], x.shape[1]))
    return x


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
    """Stores ``tile [ROWS, BLOCK_D]`` into a contiguous matrix of ``WIDTH`` columns at ``ptr``.

    Row ``i`` of the tile becomes row ``row0 + (start + i) * stride`` of the matrix, if ``start + i < size``.
    """
    rows = start + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + (row0 + rows.to(tl.int64) * stride)[:, None] * WIDTH + cols[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(rows < size)[:, None] & (cols < WIDTH)[None, :])


@jit
def _load_lse(ptrs, inside):
    """Loads log-sum-exps, with +inf in place of -inf.

    If all scores of a query are -inf, so is its log-sum-exp. With +inf its weights ``exp2(s - lse)`` are 0, not NaN.
    """
    lse = tl.load(ptrs, mask=inside, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse)


@jit
def _locate(size, ROWS: tl.constexpr, batch, heads):
    """What this program works on: ``(start, group, sample, head, split)``.

    ``start`` is the first of its ``ROWS`` rows, of ``size`` in all. In the program id blocks of rows vary fastest, then
    heads, samples and splits. ``group`` is the index of (split, sample, head).
    """
    blocks = tl.cdiv(size, ROWS)
    pid = tl.program_id(0)
    start = pid % blocks * ROWS
    group = (pid // blocks).to(tl.int64)
    head = group % heads
    sample = group // heads % batch
    split = (group // heads // batch).to(tl.int32)
    return start, group, sample, head, split


@_for_all_sizes
def cross_attention_fwd_kernel(
    q_ptr,  # [B, h, M, d]*
    k_ptr,  # [B, h, N, d]*
    v_ptr,  # [B, h, N, d]*
    bias_ptr,  # [B, N rounded up to blocks] fp32, 0, or -inf where a key is hidden or absent; or None
    out_ptr,  # [splits, B, M, h, d], written
    lse_ptr,  # [splits, B, h, M], base 2, written
    stride_q_b,
    stride_q_h,
    stride_q_m,
    stride_k_b,
    stride_k_h,
    stride_k_n,
    stride_v_b,
    stride_v_h,
    stride_v_n,
    stride_bias_b,
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
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of a block of queries of one head to one split of the keys."""
    start_m, group, sample, head, split = _locate(queries, BLOCK_M, batch, heads)
    first = split * keys_per_split

    k_ptr += sample * stride_k_b + head * stride_k_h
    v_ptr += sample * stride_v_b + head * stride_v_h
    if bias_ptr is not None:
        bias_ptr += sample * stride_bias_b
    q_ptr += sample * stride_q_b + head * stride_q_h
    q = _load_rows(q_ptr, stride_q_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
    q = as_operand(q, PRECISION, IN_PLACE=True)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stop = tl.minimum(first + keys_per_split, keys)
    if AHEAD:
        next_k = _load_rows(k_ptr, stride_k_n, first, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        next_v = _load_rows(v_ptr, stride_v_n, first, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
    for start_n in range(first, stop, BLOCK_N):
        if AHEAD:
            k, v = next_k, next_v
            ahead = _ahead(start_n, stop, BLOCK_N, EVEN)
            next_k = _load_rows(k_ptr, stride_k_n, ahead, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
            next_v = _load_rows(v_ptr, stride_v_n, ahead, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        else:
            k = _load_rows(k_ptr, stride_k_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        k = as_operand(k, PRECISION, IN_PLACE=True)
        s = tl.dot(q, tl.trans(_interleave_rows(k, PARTS)), input_precision=PRECISION) * scale_log2
        if bias_ptr is not None:
            s += tl.load(bias_ptr + start_n + _order(BLOCK_N, PARTS))[None, :]
        elif not EVEN:
            s = tl.where((start_n + _order(BLOCK_N, PARTS) < keys)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # If all scores of a row so far are -inf, its weights must be 0, not exp2(-inf + inf).
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        if not AHEAD:
            v = _load_rows(v_ptr, stride_v_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        v = as_operand(v, PRECISION, IN_PLACE=True)
        p = as_operand(p.to(v.dtype), PRECISION, IN_PLACE=True)
        acc = tl.dot(p, _interleave(v, PARTS), acc * shrink[:, None], input_precision=PRECISION)
        top = new_top

    # The row of (split, sample, m, head) in out is row0 + m * heads.
    row0 = group // heads * queries * heads + head
    out = tl.where((total == 0.0)[:, None], 0.0, _columns_in_order(acc, PARTS) / total[:, None])
    _store_rows(out_ptr, out, row0, heads, start_m, queries, BLOCK_M, WIDTH, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + group * queries + rows, top + tl.log2(total), mask=rows < queries)


@_for_all_sizes
def cross_attention_combine_kernel(
    part_ptr,  # [splits, B, M, h, d] fp32
    part_lse_ptr,  # [splits, B, h, M]
    out_ptr,  # [B, M, h, d], written
    lse_ptr,  # [B, h, M], written
    batch,
    heads,
    queries,
    splits,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Combines the splits of a block of queries of one head."""
    blocks = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    group = (pid // blocks).to(tl.int64)
    start_m = pid % blocks * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    inside = rows < queries
    sample = group // heads
    head = group % heads

    # One pass, like the online softmax over keys, with the log-sum-exps of the splits in place of scores.
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(0, splits):
        lse = tl.load(part_lse_ptr + (split * batch * heads + group) * queries + rows, mask=inside, other=0.0)
        first_row = (split * batch + sample) * queries * heads + head
        part = _load_rows(part_ptr + first_row * WIDTH, heads * WIDTH, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, False)
        new_top = tl.maximum(top, lse, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - base)
        shrink = tl.exp2(top - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        top = new_top
    row0 = sample * queries * heads + head
    out = tl.where((total == 0.0)[:, None], 0.0, acc / total[:, None])
    _store_rows(out_ptr, out, row0, heads, start_m, queries, BLOCK_M, WIDTH, BLOCK_D)
    tl.store(lse_ptr + group * queries + rows, top + tl.log2(total), mask=inside)


@_for_all_sizes
def cross_attention_bwd_q_kernel(
    grad_ptr,  # [B, h, M, d]*, gradient of out
    q_ptr,  # [B, h, M, d]*
    k_ptr,  # [B, h, N, d]*
    v_ptr,  # [B, h, N, d]*
    bias_ptr,  # [B, N rounded up to blocks] fp32, 0, or -inf where a key is hidden or absent; or None
    out_ptr,  # [B, h, M, d]*
    lse_ptr,  # [B, h, M]
    delta_ptr,  # [B, h, M], written: sum over d of grad * out
    dq_ptr,  # [splits, B, M, h, d], written
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
    stride_bias_b,
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
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient dq of a block of queries of one head, from one split of the keys."""
    start_m, group, sample, head, split = _locate(queries, BLOCK_M, batch, heads)
    first = split * keys_per_split

    rows = start_m + tl.arange(0, BLOCK_M)
    inside = rows < queries
    lse_rows = (sample * heads + head) * queries + rows
    grad_ptr += sample * stride_g_b + head * stride_g_h
    grad = _load_rows(grad_ptr, stride_g_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
    out_ptr += sample * stride_o_b + head * stride_o_h
    out = _load_rows(out_ptr, stride_o_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    if split == 0:
        tl.store(delta_ptr + lse_rows, delta, mask=inside)
    lse = _load_lse(lse_ptr + lse_rows, inside)
    q_ptr += sample * stride_q_b + head * stride_q_h
    q = as_operand(
        _load_rows(q_ptr, stride_q_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN), PRECISION, IN_PLACE=True
    )
    grad = as_operand(grad, PRECISION, IN_PLACE=True)
    k_ptr += sample * stride_k_b + head * stride_k_h
    v_ptr += sample * stride_v_b + head * stride_v_h
    if bias_ptr is not None:
        bias_ptr += sample * stride_bias_b

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stop = tl.minimum(first + keys_per_split, keys)
    if AHEAD:
        next_k = _load_rows(k_ptr, stride_k_n, first, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        next_v = _load_rows(v_ptr, stride_v_n, first, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
    for start_n in range(first, stop, BLOCK_N):
        if AHEAD:
            k, v = next_k, next_v
            ahead = _ahead(start_n, stop, BLOCK_N, EVEN)
            next_k = _load_rows(k_ptr, stride_k_n, ahead, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
            next_v = _load_rows(v_ptr, stride_v_n, ahead, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        else:
            k = _load_rows(k_ptr, stride_k_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
            v = _load_rows(v_ptr, stride_v_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
        k, v = as_operand(k, PRECISION, IN_PLACE=True), as_operand(v, PRECISION, IN_PLACE=True)
        s = tl.dot(q, tl.trans(_interleave_rows(k, PARTS)), input_precision=PRECISION) * scale_log2
        if bias_ptr is not None:
            s += tl.load(bias_ptr + start_n + _order(BLOCK_N, PARTS))[None, :]
        p = tl.exp2(s - lse[:, None])
        dp = tl.dot(grad, tl.trans(_interleave_rows(v, PARTS)), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if bias_ptr is None and not EVEN:
            # Keys beyond the last one are loaded as zeros, but exp2(-lse) times -delta need not be finite.
            ds = tl.where((start_n + _order(BLOCK_N, PARTS) < keys)[None, :], ds, 0.0)
        ds = as_operand(ds.to(k.dtype), PRECISION, IN_PLACE=True)
        acc = tl.dot(ds, _interleave(k, PARTS), acc, input_precision=PRECISION)

    row0 = group // heads * queries * heads + head
    _store_rows(dq_ptr, _columns_in_order(acc, PARTS) * scale, row0, heads, start_m, queries, BLOCK_M, WIDTH, BLOCK_D)


@_for_all_sizes
def cross_attention_bwd_kv_kernel(
    grad_ptr,  # [B, h, M, d]*, gradient of out
    q_ptr,  # [B, h, M, d]*
    k_ptr,  # [B, h, N, d]*
    v_ptr,  # [B, h, N, d]*
    bias_ptr,  # [B, N rounded up to blocks] fp32, 0, or -inf where a key is hidden or absent; or None
    lse_ptr,  # [B, h, M]
    delta_ptr,  # [B, h, M], from cross_attention_bwd_q_kernel
    dk_ptr,  # [splits, B, N, row_heads, d], the first h heads of each row are written
    dv_ptr,  # [splits, B, N, row_heads, d], the first h heads of each row are written
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
    stride_bias_b,
    batch,
    heads,
    queries,
    keys,
    queries_per_split,
    row_heads,
    scale,
    scale_log2,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients dk and dv of a block of keys and values of one head, from one split of the queries."""
    start_n, group, sample, head, split = _locate(keys, BLOCK_N, batch, heads)
    first = split * queries_per_split

    k_ptr += sample * stride_k_b + head * stride_k_h
    v_ptr += sample * stride_v_b + head * stride_v_h
    k = _load_rows(k_ptr, stride_k_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
    v = _load_rows(v_ptr, stride_v_n, start_n, keys, BLOCK_N, WIDTH, BLOCK_D, EVEN)
    k, v = as_operand(k, PRECISION, IN_PLACE=True), as_operand(v, PRECISION, IN_PLACE=True)
    grad_ptr += sample * stride_g_b + head * stride_g_h
    q_ptr += sample * stride_q_b + head * stride_q_h
    lse_ptr += (sample * heads + head) * queries
    delta_ptr += (sample * heads + head) * queries
    if bias_ptr is not None:
        bias_ptr += sample * stride_bias_b
        bias = tl.load(bias_ptr + start_n + tl.arange(0, BLOCK_N))

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    stop = tl.minimum(first + queries_per_split, queries)
    if AHEAD:
        next_q = _load_rows(q_ptr, stride_q_m, first, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
        next_grad = _load_rows(grad_ptr, stride_g_m, first, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
    for start_m in range(first, stop, BLOCK_M):
        rows = start_m + _order(BLOCK_M, PARTS)
        inside = rows < queries
        if AHEAD:
            q, grad = next_q, next_grad
            ahead = _ahead(start_m, stop, BLOCK_M, EVEN)
            next_q = _load_rows(q_ptr, stride_q_m, ahead, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
            next_grad = _load_rows(grad_ptr, stride_g_m, ahead, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
        else:
            q = _load_rows(q_ptr, stride_q_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
            grad = _load_rows(grad_ptr, stride_g_m, start_m, queries, BLOCK_M, WIDTH, BLOCK_D, EVEN)
        q, grad = as_operand(q, PRECISION, IN_PLACE=True), as_operand(grad, PRECISION, IN_PLACE=True)
        lse = _load_lse(lse_ptr + rows, inside)
        delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        # Scores are transposed, [N, M], so that their rows are keys, like the rows of dk and dv.
        s = tl.dot(k, tl.trans(_interleave_rows(q, PARTS)), input_precision=PRECISION) * scale_log2
        if bias_ptr is not None:
            s += bias[:, None]
        p = tl.exp2(s - lse[None, :])
        if not EVEN:
            # Queries beyond the last one are loaded as zeros, but infinite keys or values would make them NaN.
            p = tl.where(inside[None, :], p, 0.0)
        weights = as_operand(p.to(grad.dtype), PRECISION, IN_PLACE=True)
        dv = tl.dot(weights, _interleave(grad, PARTS), dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(_interleave_rows(grad, PARTS)), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if not EVEN:
            ds = tl.where(inside[None, :], ds, 0.0)
        ds = as_operand(ds.to(q.dtype), PRECISION, IN_PLACE=True)
        dk = tl.dot(ds, _interleave(q, PARTS), dk, input_precision=PRECISION)

    row0 = group // heads * keys * row_heads + head
    dk, dv = _columns_in_order(dk, PARTS) * scale, _columns_in_order(dv, PARTS)
    _store_rows(dk_ptr, dk, row0, row_heads, start_n, keys, BLOCK_N, WIDTH, BLOCK_D)
    _store_rows(dv_ptr, dv, row0, row_heads, start_n, keys, BLOCK_N, WIDTH, BLOCK_D)
