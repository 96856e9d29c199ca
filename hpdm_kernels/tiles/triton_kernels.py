"""Kernels of tiles, launched by :mod:`hpdm_kernels.tiles.triton_backend`.

One program gathers each element of the result, so there are no atomics. Offsets are int64, since the tiles of a long
video exceed 2**31 elements. Small tables, made once per set of origins and device, tell which tiles cover a coordinate.

Columns are processed in groups of ``VECTOR`` neighbors. The columns of a group are covered by the same tiles and are
adjacent in each of them, so a group needs one lookup and one load of 16 bytes. This requires origins, widths and
strides that are multiples of 16 bytes; otherwise a group is one column.

The table ``cover [F + H + W / VECTOR]`` int64 has an entry for each frame, each row and each group of columns: the
first tile along this axis that covers it, times 2**32, plus the number of such tiles. One load of neighboring entries
thus tells the threads of a warp all about their columns.

The table ``shares [T_w * w + T_f * f + T_h * h]`` of an average with weights is
:class:`hpdm_kernels.tiles.weights.Shares`.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._triton import jit, kernel, tl


@jit
def _aligned(at, VECTOR: tl.constexpr):
    """Offsets ``[H, W, VECTOR]`` of all columns, from those of the groups ``[H, W]``.

    Tells the compiler that the columns of a group are adjacent and aligned, so that it loads them together.
    """
    at = at[:, :, None] + tl.arange(0, VECTOR)[None, None, :]
    return tl.max_contiguous(tl.multiple_of(at, (1, 1, VECTOR)), (1, 1, VECTOR))


@jit
def _first(cover):
    """The first tile of entries of the table ``cover``."""
    return (cover >> 32).to(tl.int32)


@jit
def _count(cover):
    """The number of tiles of entries of the table ``cover``."""
    return cover.to(tl.int32)


@kernel(specialize=("stride_video_w",))
def extract_tiles_kernel(
    video_ptr,  # [B, C, F, H, W] of the strides below
    out_ptr,  # [B, T, C, tile_f, tile_h, tile_w], written
    origins_ptr,  # [T, 3] int32
    cover_ptr,  # [F + H + W / VECTOR] int64
    shares_ptr,  # [n_tiles_w * tile_w + n_tiles_f * tile_f + n_tiles_h * tile_h] fp32, read with SHARES
    scale,
    stride_video_b, stride_video_c, stride_video_f, stride_video_h, stride_video_w,
    T, C, F, H, tile_f, tile_h, tile_w, n_tiles_f, n_tiles_h, n_tiles_w, n_blocks_r, n_blocks_w,
    MEAN: tl.constexpr, SHARES: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Some rows of one tile per program, of any frames and channels: ``scale`` times the video.

    ``MEAN``: each voxel is also divided by the number of tiles that cover it. ``SHARES``: it is multiplied by the
    tile's share of it.
    """
    pid = tl.program_id(0)
    t = pid // (n_blocks_r * n_blocks_w)
    row = pid // n_blocks_w % n_blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    group = pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    tile_k = group * VECTOR
    frame = row // tile_h
    c = frame // tile_f
    origin = origins_ptr + 3 * (t % T)
    i = tl.load(origin) + frame - c * tile_f
    j = tl.load(origin + 1) + row - frame * tile_h
    k = tl.load(origin + 2) + tile_k
    real = row < C * tile_f * tile_h
    mask = (real[:, None] & (tile_k < tile_w)[None, :])[:, :, None]
    rows = (t // T).to(tl.int64) * stride_video_b + c.to(tl.int64) * stride_video_c
    rows += i.to(tl.int64) * stride_video_f + j.to(tl.int64) * stride_video_h
    cols = k.to(tl.int64) * stride_video_w
    at = _aligned(rows[:, None] + cols[None, :], VECTOR)
    value = tl.load(video_ptr + at, mask=mask, other=0.0).to(tl.float32) * scale
    if MEAN:
        count_f = _count(tl.load(cover_ptr + i, mask=real, other=1))
        count_h = _count(tl.load(cover_ptr + F + j, mask=real, other=1))
        count_w = _count(tl.load(cover_ptr + F + H + k // VECTOR, mask=tile_k < tile_w, other=1))
        value /= ((count_f * count_h)[:, None] * count_w[None, :]).to(tl.float32)[:, :, None]
    if SHARES:
        n = t % T
        frames = n_tiles_w * tile_w + n // n_tiles_w // n_tiles_h * tile_f + frame - c * tile_f
        at_h = n // n_tiles_w % n_tiles_h * tile_h + row - frame * tile_h
        at_h += n_tiles_w * tile_w + n_tiles_f * tile_f
        share = tl.load(shares_ptr + frames, mask=real, other=0.0) * tl.load(shares_ptr + at_h, mask=real, other=0.0)
        # Of the shape of the block, though rows have the same: else layouts are converted in shared memory.
        at_w = _aligned((row * 0)[:, None] + (n % n_tiles_w * tile_w + tile_k)[None, :], VECTOR)
        value *= share[:, None, None] * tl.load(shares_ptr + at_w, mask=mask, other=0.0)
    rows = (t.to(tl.int64) * C * tile_f * tile_h + row) * tile_w
    tl.store(out_ptr + _aligned(rows[:, None] + tile_k[None, :], VECTOR), value.to(out_ptr.dtype.element_ty), mask=mask)


# One kernel serves the average, the chunks of an accumulator and its step, so that all add tiles in the same way. That
# is why it is long and has many arguments, which a kernel cannot group in structures.
@kernel(specialize=("stride_tiles_w", "stride_x_w"))
def average_tiles_kernel(
    tiles_ptr,  # [B, T or a chunk of them, C, f, h, w] of the strides below
    sums_ptr,  # [B, C, F, H, W] fp32, sums over the tiles before ``first``
    x_ptr,  # [B, C, F, H, W] of the strides below
    out_ptr,  # [B, C, F, H, W], written
    starts_ptr,  # [n_tiles_f + n_tiles_h + n_tiles_w] int32, origins of the grid per axis
    cover_ptr,  # [F + H + W / VECTOR] int64
    shares_ptr,  # [n_tiles_w * tile_w + n_tiles_f * tile_f + n_tiles_h * tile_h] fp32, read with SHARES
    alpha, beta,
    stride_tiles_b, stride_tiles_t, stride_tiles_c, stride_tiles_f, stride_tiles_h, stride_tiles_w,
    stride_x_b, stride_x_c, stride_x_f, stride_x_h, stride_x_w,
    C, F, H, W, tile_f, tile_h, tile_w, n_tiles_f, n_tiles_h, n_tiles_w, most_f, most_h, most_w, first, stop,
    box_f, box_h, box_w, frames, stop_h, stop_w, n_blocks_r, n_blocks_w,
    ADD: tl.constexpr, SUMS: tl.constexpr, FINISH: tl.constexpr, MEAN: tl.constexpr, SHARES: tl.constexpr,
    HAS_X: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part of one frame of one channel of a box per program: adds tiles ``first`` to ``stop - 1``, in their order.

    ``ADD``: there are such tiles. ``SUMS``: they are a chunk, and ``sums`` holds the tiles before it. ``FINISH``: they
    are the last ones, and ``out`` is ``alpha * x + beta * sums``; with ``MEAN`` the sums are first divided by the
    number of tiles. Without ``FINISH``, ``out`` is the new sums. ``SHARES``: tiles are multiplied by their shares of a
    voxel before they are added. ``most_f, most_h, most_w`` are the
    largest numbers of tiles that cover a coordinate. There is a single loop with the same bounds in all threads,
    because nested loops spilled registers.
    """
    pid = tl.program_id(0)
    frame = pid // (n_blocks_r * n_blocks_w)
    i = box_f + frame % frames
    c = (frame // frames % C).to(tl.int64)
    b = (frame // frames // C).to(tl.int64)
    j = box_h + pid // n_blocks_w % n_blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
    group = box_w // VECTOR + pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    k = group * VECTOR
    cover_f = tl.load(cover_ptr + i)
    cover_h = tl.load(cover_ptr + F + j, mask=j < stop_h, other=0)
    cover_w = tl.load(cover_ptr + F + H + group, mask=k < stop_w, other=0)
    first_f, first_h, first_w = _first(cover_f), _first(cover_h), _first(cover_w)
    count_f, count_h, count_w = _count(cover_f), _count(cover_h), _count(cover_w)
    rows = (((b * C + c) * F + i) * H + j) * W
    at = _aligned(rows[:, None] + k[None, :], VECTOR)
    mask = (j < stop_h)[:, None] & (k < stop_w)[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_W, VECTOR), dtype=tl.float32)
    if SUMS:
        # The first tile of a voxel overwrites the buffer, so it need not be zeroed.
        started = (first_f * n_tiles_h + first_h[:, None]) * n_tiles_w + first_w[None, :] < first
        total += tl.load(sums_ptr + at, mask=(mask & started)[:, :, None], other=0.0)
    if ADD:
        base = b * stride_tiles_b + c * stride_tiles_c
        for near in range(most_f * most_h * most_w):
            near_f, near_h, near_w = near // most_w // most_h, near // most_w % most_h, near % most_w
            t_f, t_h, t_w = first_f + near_f, first_h + near_h, first_w + near_w
            mask_h = near_h < tl.where(near_f < count_f, count_h, 0)
            mask_w = near_w < count_w
            tile_i = i - tl.load(starts_ptr + tl.minimum(t_f, n_tiles_f - 1))
            tile_j = j - tl.load(starts_ptr + n_tiles_f + tl.minimum(t_h, n_tiles_h - 1))
            tile_k = k - tl.load(starts_ptr + n_tiles_f + n_tiles_h + tl.minimum(t_w, n_tiles_w - 1))
            t = (t_f * n_tiles_h + t_h) * n_tiles_w - first
            rows = base + t.to(tl.int64) * stride_tiles_t
            rows += tile_i.to(tl.int64) * stride_tiles_f + tile_j.to(tl.int64) * stride_tiles_h
            cols = t_w.to(tl.int64) * stride_tiles_t + tile_k.to(tl.int64) * stride_tiles_w
            here = mask_h[:, None] & mask_w[None, :]
            if SUMS:
                number = t[:, None] + t_w[None, :]
                here = here & (number >= 0) & (number < stop - first)
            tile = tiles_ptr + _aligned(rows[:, None] + cols[None, :], VECTOR)
            value = tl.load(tile, mask=here[:, :, None], other=0.0).to(tl.float32)
            if SHARES:
                frames_ptr = shares_ptr + n_tiles_w * tile_w
                share = tl.load(frames_ptr + t_f * tile_f + tile_i, mask=near_f < count_f, other=0.0)
                at_h = n_tiles_f * tile_f + t_h * tile_h + tile_j
                share = share * tl.load(frames_ptr + at_h, mask=mask_h, other=0.0)
                # Of the shape of the block, though rows have the same: else layouts are converted in shared memory.
                at_w = _aligned((t_h * 0)[:, None] + (t_w * tile_w + tile_k)[None, :], VECTOR)
                value *= share[:, None, None] * tl.load(shares_ptr + at_w, mask=here[:, :, None], other=0.0)
            total += value
    if FINISH:
        if MEAN:
            count = count_f * count_h[:, None] * count_w[None, :]
            total /= tl.where(mask, count, 1).to(tl.float32)[:, :, None]
        total *= beta
        if HAS_X:
            rows = b * stride_x_b + c * stride_x_c + i.to(tl.int64) * stride_x_f + j.to(tl.int64) * stride_x_h
            cols = k.to(tl.int64) * stride_x_w
            x = x_ptr + _aligned(rows[:, None] + cols[None, :], VECTOR)
            total += alpha * tl.load(x, mask=mask[:, :, None], other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])
