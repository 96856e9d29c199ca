"""Kernels of temporal attention, launched by :mod:`hpdm_kernels.temporal.triton_backend`.

A program takes one head at ``BLOCK_N`` positions. It holds the keys and values of all frames, ``[T, N, D]``, and goes
through the queries frame by frame, with the embeddings of that frame's distances, ``[T, D]``, which come from the
cache. Products are sums over channels, and sums over frames within each thread: a sequence is too short for matrix
units, whose smallest tiles would be filled with zeros, and memory takes longer than all of its arithmetic.

Backward a program goes through a chunk of positions. For each distance it keeps sums of the gradients of both
embeddings in memory of its own, ``[2, 2 T - 1, D]``; PyTorch adds the programs' sums.

All arithmetic is fp32. Offsets are int64. Masked lanes are zero, so that they add nothing.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._triton import jit, kernel, tl


@jit
def _product(x, y):
    """``x * y``, rounded before it is added to another number, unlike ``x * y`` itself.

    Two threads that exchange products and add them up would else differ by a rounding: each adds its own product in one
    operation to the rounded one that it got. Then both write the sum to one place, and nothing says which one stays.
    """
    return tl.fma(x, y, 0.0)


@jit
def _embeddings(pointer, t, s, column, farthest, real, WIDTH: tl.constexpr):
    """The embeddings of the distances from frame ``t`` to the frames ``s``, fp32 ``[T, D]``."""
    distance = tl.minimum(tl.maximum(s - t, -farthest), farthest)
    at = pointer + (distance + farthest)[:, None] * WIDTH + column[None, :]
    return tl.load(at, mask=real[:, None] & (column < WIDTH)[None, :], other=0.0).to(tl.float32)


@jit
def _weights(q, k, of_keys, real):
    """The softmax over frames, in base 2, of ``q [N, D]`` with ``k [T, N, D]`` and ``of_keys [T, D]``: ``[T, N]``."""
    scores = tl.sum(_product(q[None, :, :], k + of_keys[:, None, :]), axis=2)
    scores = tl.where(real[:, None], scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, axis=0)[None, :])
    return weights / tl.sum(weights, axis=0)[None, :]


@kernel(specialize=("stride_qkv_b", "stride_qkv_t", "stride_qkv_n"))
def temporal_attention_fwd_kernel(
    qkv_ptr,  # [B, T, N, 3 h d], the last axis contiguous
    rel_k_ptr,  # [2 R + 1, d]
    rel_v_ptr,  # [2 R + 1, d]
    out_ptr,  # [B, T, N, h d], contiguous, written
    stride_qkv_b, stride_qkv_t, stride_qkv_n, frames, positions, heads, farthest, blocks, scale_log2,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All frames of one head at ``BLOCK_N`` positions of one sample."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    n = program // heads % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (program // heads // blocks).to(tl.int64)
    s = tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    real = s < frames
    here = (n < positions)[:, None] & (column < WIDTH)[None, :]
    inside = real[:, None, None] & here[None, :, :]
    width = tl.cast(heads, tl.int64) * WIDTH
    # Of the first frame, whose rows are [N, D].
    first = qkv_ptr + b * stride_qkv_b + head * WIDTH + n.to(tl.int64)[:, None] * stride_qkv_n + column[None, :]
    at = first[None, :, :] + s.to(tl.int64)[:, None, None] * stride_qkv_t
    k = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(at + 2 * width, mask=inside, other=0.0).to(tl.float32)
    to = out_ptr + (b * frames * positions + n)[:, None] * width + head * WIDTH + column[None, :]
    for t in range(0, frames):
        q = tl.load(first + tl.cast(t, tl.int64) * stride_qkv_t, mask=here, other=0.0).to(tl.float32) * scale_log2
        weights = _weights(q, k, _embeddings(rel_k_ptr, t, s, column, farthest, real, WIDTH), real)
        of_values = _embeddings(rel_v_ptr, t, s, column, farthest, real, WIDTH)
        out = tl.sum(_product(weights[:, :, None], v + of_values[:, None, :]), axis=0)
        tl.store(to + tl.cast(t, tl.int64) * positions * width, out.to(out_ptr.dtype.element_ty), mask=here)


@kernel(specialize=("stride_grad_b", "stride_grad_t", "stride_grad_n", "stride_qkv_b", "stride_qkv_t", "stride_qkv_n"))
def temporal_attention_bwd_kernel(
    grad_ptr,  # [B, T, N, h d], the last axis contiguous
    qkv_ptr,  # [B, T, N, 3 h d], the last axis contiguous
    rel_k_ptr,  # [2 R + 1, d]
    rel_v_ptr,  # [2 R + 1, d]
    dqkv_ptr,  # [B, T, N, 3 h d], contiguous, written
    sums_ptr,  # [programs, 2, 2 T - 1, d] fp32, written
    stride_grad_b, stride_grad_t, stride_grad_n, stride_qkv_b, stride_qkv_t, stride_qkv_n,
    frames, positions, heads, farthest, chunks, chunk, scale, scale_log2,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All frames of one head at ``chunk`` positions of one sample."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    start = program // heads % chunks * chunk
    b = (program // heads // chunks).to(tl.int64)
    s = tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_D)
    real = s < frames
    wide = column < WIDTH
    pairs = real[:, None] & wide[None, :]
    width = tl.cast(heads, tl.int64) * WIDTH
    distances = 2 * frames - 1
    # The sums of the distances of frame t to all frames are BLOCK_T rows from row T - 1 - t on.
    sums_ptr += program.to(tl.int64) * 2 * distances * WIDTH
    row = tl.arange(0, 2 * BLOCK_T)
    zeros = tl.zeros((2 * BLOCK_T, BLOCK_D), tl.float32)
    clear = (row < distances)[:, None] & wide[None, :]
    tl.store(sums_ptr + row[:, None] * WIDTH + column[None, :], zeros, mask=clear)
    tl.store(sums_ptr + (distances + row)[:, None] * WIDTH + column[None, :], zeros, mask=clear)
    tl.debug_barrier()
    for begin in range(start, tl.minimum(start + chunk, positions), BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        here = (n < positions)[:, None] & wide[None, :]
        inside = real[:, None, None] & here[None, :, :]
        row_n = n.to(tl.int64)[:, None]
        first = qkv_ptr + b * stride_qkv_b + head * WIDTH + row_n * stride_qkv_n + column[None, :]
        at = first[None, :, :] + s.to(tl.int64)[:, None, None] * stride_qkv_t
        k = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(at + 2 * width, mask=inside, other=0.0).to(tl.float32)
        above = grad_ptr + b * stride_grad_b + head * WIDTH + row_n * stride_grad_n + column[None, :]
        to = dqkv_ptr + (b * frames * positions + row_n) * 3 * width + head * WIDTH + column[None, :]
        dk = tl.zeros((BLOCK_T, BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_T, BLOCK_N, BLOCK_D), tl.float32)
        for t in range(0, frames):
            q = tl.load(first + tl.cast(t, tl.int64) * stride_qkv_t, mask=here, other=0.0).to(tl.float32)
            grad = tl.load(above + tl.cast(t, tl.int64) * stride_grad_t, mask=here, other=0.0).to(tl.float32)
            of_keys = _embeddings(rel_k_ptr, t, s, column, farthest, real, WIDTH)
            weights = _weights(q * scale_log2, k, of_keys, real)
            of_values = _embeddings(rel_v_ptr, t, s, column, farthest, real, WIDTH)
            of_weights = tl.sum(_product(grad[None, :, :], v + of_values[:, None, :]), axis=2)
            inner = weights * (of_weights - tl.sum(_product(weights, of_weights), axis=0)[None, :]) * scale
            dq = tl.sum(_product(inner[:, :, None], k + of_keys[:, None, :]), axis=0)
            tl.store(to + tl.cast(t, tl.int64) * positions * 3 * width, dq.to(dqkv_ptr.dtype.element_ty), mask=here)
            # For the distances of this frame to all frames, one row after the other.
            sums = sums_ptr + (s - t + frames - 1)[:, None] * WIDTH + column[None, :]
            of_k = _product(inner[:, :, None], q[None, :, :])
            dk += of_k
            tl.store(sums, tl.load(sums, mask=pairs, other=0.0) + tl.sum(of_k, axis=1), mask=pairs)
            of_v = _product(weights[:, :, None], grad[None, :, :])
            dv += of_v
            sums += distances * WIDTH
            tl.store(sums, tl.load(sums, mask=pairs, other=0.0) + tl.sum(of_v, axis=1), mask=pairs)
            # The next frame adds to these rows, too, one row further up.
            tl.debug_barrier()
        to_all = to[None, :, :] + s.to(tl.int64)[:, None, None] * positions * 3 * width
        tl.store(to_all + width, dk.to(dqkv_ptr.dtype.element_ty), mask=inside)
        tl.store(to_all + 2 * width, dv.to(dqkv_ptr.dtype.element_ty), mask=inside)
