"""Kernels of patch extraction (paper eq. 6), launched by :mod:`hpdm_kernels.patches.triton_backend`.

The window of an output, and the outputs of a pixel, are ranges in closed form. A program works on rows and columns of
one frame of one channel: values that depend on the frame are scalars, values that depend on a row or a column are short
vectors. Ranges are computed from the box, which only the kernel reads, never the host. Windows follow
``reference.area_weights`` operation by operation, in fp32. Offsets into videos are int64.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._triton import jit, kernel, tl


@jit
def _snap(edge, SNAP: tl.constexpr):
    """Moves a window's edge onto a whole pixel if it is closer than ``SNAP`` to it."""
    whole = tl.floor(edge + 0.5)
    return tl.where(tl.abs(edge - whole) < SNAP, whole, edge)


@jit
def _window(offset, scale, i, n, resolution, SNAP: tl.constexpr):
    """The window of output ``i`` of ``n`` along an axis of ``resolution`` pixels: its low and high edge, in pixels."""
    center = (offset + scale * tl.div_rn(i.to(tl.float32) + 0.5, n * 1.0)) * (resolution * 1.0)
    half = tl.maximum(tl.div_rn(scale * (resolution * 1.0), n * 1.0), 1.0) * 0.5
    return _snap(center - half, SNAP), _snap(center + half, SNAP)


@jit
def _weight(low, high, pixel, resolution):
    """The share of ``pixel`` in the window from ``low`` to ``high``; border pixels extend beyond the video."""
    left = tl.where(pixel == 0, float("-inf"), pixel.to(tl.float32))
    right = tl.where(pixel == resolution - 1, float("inf"), pixel.to(tl.float32) + 1.0)
    return tl.maximum(tl.minimum(high, right) - tl.maximum(low, left), 0.0) / (high - low)


@jit
def _pixels(low, high, resolution):
    """First and last pixel of a window."""
    first = tl.minimum(tl.maximum(tl.floor(low), 0.0), resolution - 1.0).to(tl.int32)
    last = tl.minimum(tl.maximum(tl.ceil(high) - 1.0, 0.0), resolution - 1.0).to(tl.int32)
    return first, last


@jit
def _outputs(offset, scale, pixel, n, resolution, SNAP: tl.constexpr):
    """First and last output whose window touches ``pixel``; the last is below the first if there is no such output.

    Inverting the formula of the center rounds. So each end is compared with its windows and moved by one if needed.
    """
    step = tl.div_rn(scale * (resolution * 1.0), n * 1.0)
    reach = tl.maximum(step, 1.0) * 0.5 + SNAP
    at = pixel.to(tl.float32) - offset * (resolution * 1.0)
    first = tl.floor((at - reach) / step - 0.5) + 1.0
    last = tl.ceil((at + 1.0 + reach) / step - 0.5) - 1.0
    first = tl.minimum(tl.maximum(first, 0.0), n * 1.0).to(tl.int32)
    last = tl.minimum(tl.maximum(last, -1.0), n - 1.0).to(tl.int32)
    _, high = _window(offset, scale, first - 1, n, resolution, SNAP)
    first -= ((first > 0) & (high > pixel)).to(tl.int32)
    _, high = _window(offset, scale, first, n, resolution, SNAP)
    first += (high <= pixel).to(tl.int32)
    low, _ = _window(offset, scale, last + 1, n, resolution, SNAP)
    last += ((last < n - 1) & (low < pixel + 1)).to(tl.int32)
    low, _ = _window(offset, scale, last, n, resolution, SNAP)
    last -= ((last >= 0) & (low >= pixel + 1)).to(tl.int32)
    return first, last


@kernel(specialize=("stride_video_w",))
def sample_patches_fwd_kernel(
    video_ptr,  # [B, C, F, H, W] of the strides below
    box_ptr,  # [B, 6] fp32
    out_ptr,  # [B, C, out_f, out_h, out_w], written
    stride_video_b, stride_video_c, stride_video_f, stride_video_h, stride_video_w,
    C, F, H, W, out_f, out_h, out_w, n_blocks_h, n_blocks_w,
    SNAP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part of one output frame of one channel per program: the weighted sum over the pixels of each window."""
    pid = tl.program_id(0)
    frame = pid // (n_blocks_h * n_blocks_w)
    c = frame // out_f % C
    b = frame // out_f // C
    j = pid // n_blocks_w % n_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    k = pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    box_ptr += 6 * b
    low_f, high_f = _window(tl.load(box_ptr), tl.load(box_ptr + 3), frame % out_f, out_f, F, SNAP)
    low_h, high_h = _window(tl.load(box_ptr + 1), tl.load(box_ptr + 4), j, out_h, H, SNAP)
    low_w, high_w = _window(tl.load(box_ptr + 2), tl.load(box_ptr + 5), k, out_w, W, SNAP)
    first_f, last_f = _pixels(low_f, high_f, F)
    first_h, last_h = _pixels(low_h, high_h, H)
    first_w, last_w = _pixels(low_w, high_w, W)
    last_h = tl.where(j < out_h, last_h, -1)
    last_w = tl.where(k < out_w, last_w, -1)
    most_h = tl.max(last_h - first_h, axis=0) + 1
    most_w = tl.max(last_w - first_w, axis=0) + 1
    base = video_ptr + b.to(tl.int64) * stride_video_b + c.to(tl.int64) * stride_video_c
    total = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
    for near_f in range(last_f - first_f + 1):
        p = first_f + near_f
        slab = base + p.to(tl.int64) * stride_video_f
        weight_f = _weight(low_f, high_f, p, F)
        for near_h in range(most_h):
            q = first_h + near_h
            rows = slab + q.to(tl.int64) * stride_video_h
            across = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
            for near_w in range(most_w):
                r = first_w + near_w
                cols = r.to(tl.int64) * stride_video_w
                mask = (q <= last_h)[:, None] & (r <= last_w)[None, :]
                value = tl.load(rows[:, None] + cols[None, :], mask=mask, other=0).to(tl.float32)
                across += _weight(low_w, high_w, r, W)[None, :] * value
            total += (weight_f * _weight(low_h, high_h, q, H))[:, None] * across
    rows = out_ptr + (frame.to(tl.int64) * out_h + j) * out_w
    mask = (j < out_h)[:, None] & (k < out_w)[None, :]
    tl.store(rows[:, None] + k[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@kernel(specialize=("stride_grad_w",))
def sample_patches_bwd_kernel(
    grad_ptr,  # [B, C, out_f, out_h, out_w] of the strides below
    box_ptr,  # [B, 6] fp32
    dvideo_ptr,  # [B, C, F, H, W], written
    stride_grad_b, stride_grad_c, stride_grad_f, stride_grad_h, stride_grad_w,
    C, F, H, W, out_f, out_h, out_w, n_blocks_h, n_blocks_w,
    SNAP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Part of one video frame of one channel per program: the weighted sum over the outputs of each pixel."""
    pid = tl.program_id(0)
    frame = pid // (n_blocks_h * n_blocks_w)
    p = frame % F
    c = frame // F % C
    b = frame // F // C
    q = pid // n_blocks_w % n_blocks_h * BLOCK_H + tl.arange(0, BLOCK_H)
    r = pid % n_blocks_w * BLOCK_W + tl.arange(0, BLOCK_W)
    box_ptr += 6 * b
    offset_f, scale_f = tl.load(box_ptr), tl.load(box_ptr + 3)
    offset_h, scale_h = tl.load(box_ptr + 1), tl.load(box_ptr + 4)
    offset_w, scale_w = tl.load(box_ptr + 2), tl.load(box_ptr + 5)
    first_f, last_f = _outputs(offset_f, scale_f, p, out_f, F, SNAP)
    first_h, last_h = _outputs(offset_h, scale_h, q, out_h, H, SNAP)
    first_w, last_w = _outputs(offset_w, scale_w, r, out_w, W, SNAP)
    last_h = tl.where(q < H, last_h, -1)
    last_w = tl.where(r < W, last_w, -1)
    most_h = tl.max(last_h - first_h, axis=0) + 1
    most_w = tl.max(last_w - first_w, axis=0) + 1
    base = grad_ptr + b.to(tl.int64) * stride_grad_b + c.to(tl.int64) * stride_grad_c
    total = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
    for near_f in range(last_f - first_f + 1):
        i = first_f + near_f
        slab = base + i.to(tl.int64) * stride_grad_f
        low_f, high_f = _window(offset_f, scale_f, i, out_f, F, SNAP)
        weight_f = _weight(low_f, high_f, p, F)
        for near_h in range(most_h):
            j = first_h + near_h
            rows = slab + j.to(tl.int64) * stride_grad_h
            low_h, high_h = _window(offset_h, scale_h, j, out_h, H, SNAP)
            weight_h = weight_f * _weight(low_h, high_h, q, H)
            across = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
            for near_w in range(most_w):
                k = first_w + near_w
                cols = k.to(tl.int64) * stride_grad_w
                low_w, high_w = _window(offset_w, scale_w, k, out_w, W, SNAP)
                mask = (j <= last_h)[:, None] & (k <= last_w)[None, :]
                value = tl.load(rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
                across += _weight(low_w, high_w, r, W)[None, :] * value
            total += weight_h[:, None] * across
    rows = dvideo_ptr + (frame.to(tl.int64) * H + q) * W
    mask = (q < H)[:, None] & (r < W)[None, :]
    tl.store(rows[:, None] + r[None, :], total.to(dvideo_ptr.dtype.element_ty), mask=mask)
