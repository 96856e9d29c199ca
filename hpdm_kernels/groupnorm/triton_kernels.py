"""Kernels of group normalization, launched by :mod:`hpdm_kernels.groupnorm.triton_backend`.

Rows are the pixels of a frame. A program goes through a chunk of the rows of one frame, ``ROWS`` by ``BLOCK_C`` numbers
at a time. Forward one kernel writes the moments of every chunk and channel, a second one merges those of a group, a
third one normalizes, modulates, activates and writes, repeated edges included. Backward it is the same: partial sums,
what follows from them, and the gradient of ``x``. What is repeated is summed where it is read.

All arithmetic is fp32. Offsets of rows are int64. Masked lanes are zero, so that they add nothing.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._triton import jit, kernel, tl


@jit
def _place(chunks, chunk, rows, channels, BLOCK_C: tl.constexpr):
    """What a program works on: frame, chunk, its first row and the row behind it, channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = program // blocks % chunks
    first = part * chunk
    return program // blocks // chunks, part, first, tl.minimum(first + chunk, rows), channel


@jit
def _vector(pointer, offset, channel, inside):
    """A vector of channels in fp32, from an int64 offset."""
    return tl.load(pointer + offset + channel, mask=inside, other=0.0).to(tl.float32)


@jit
def _pixels(pointer, base, h, w, channel, stride_h, stride_w, inside):
    """Pixels of a frame, which begins at the int64 offset ``base``, in fp32: ``[ROWS, BLOCK_C]``."""
    at = base + h.to(tl.int64)[:, None] * stride_h + w.to(tl.int64)[:, None] * stride_w + channel[None, :]
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _affine(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, t, channel, wide,
    stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t, MODULATED: tl.constexpr,
):  # fmt: skip
    """What normalized rows of a frame are multiplied with, and what is added."""
    gain = tl.load(weight_ptr + channel, mask=wide, other=0.0).to(tl.float32)
    offset = tl.load(bias_ptr + channel, mask=wide, other=0.0).to(tl.float32)
    if MODULATED:
        at_scale = b.to(tl.int64) * stride_scale_b + tl.cast(t, tl.int64) * stride_scale_t
        at_shift = b.to(tl.int64) * stride_shift_b + t.to(tl.int64) * stride_shift_t
        factor = 1.0 + _vector(scale_ptr, at_scale, channel, wide)
        offset = offset * factor + _vector(shift_ptr, at_shift, channel, wide)
        gain = gain * factor
    return gain, offset


@jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@kernel(specialize=("stride_x_b", "stride_x_t", "stride_x_h", "stride_x_w", "channels"))
def group_moments_kernel(
    x_ptr, moments_ptr, stride_x_b, stride_x_t, stride_x_h, stride_x_w, frames, width, rows, channels, chunks, chunk,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean of each channel in each chunk of rows, and the sum of squares around it: ``[B T, chunks, 2, C]``."""
    frame, part, first, last, channel = _place(chunks, chunk, rows, channels, BLOCK_C)
    base = (frame // frames).to(tl.int64) * stride_x_b + (frame % frames).to(tl.int64) * stride_x_t
    wide = channel < channels
    # Every lane keeps moments of its own (Welford 1962); they are merged at the end.
    count = tl.zeros((ROWS,), tl.float32)
    mean = tl.zeros((ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < last
        inside = real[:, None] & wide[None, :]
        x = _pixels(x_ptr, base, row // width, row % width, channel, stride_x_h, stride_x_w, inside)
        count += tl.where(real, 1.0, 0.0)
        distance = tl.where(inside, x - mean, 0.0)
        mean += distance / tl.maximum(count, 1.0)[:, None]
        squares += distance * tl.where(inside, x - mean, 0.0)
    number = (last - first).to(tl.float32)
    merged = tl.sum(mean * count[:, None], axis=0) / number
    distance = mean - merged[None, :]
    total = tl.sum(squares + distance * distance * count[:, None], axis=0)
    to = moments_ptr + (frame.to(tl.int64) * chunks + part) * 2 * channels + channel
    tl.store(to, merged, mask=wide)
    tl.store(to + channels, total, mask=wide)


@kernel()
def group_statistics_kernel(
    moments_ptr, mean_ptr, rstd_ptr, groups, group_width, frames, chunks, chunk, rows, eps, BLOCK: tl.constexpr
):
    """Mean and reciprocal deviation of one group, of the moments of all channels and chunks of ``frames`` frames."""
    program = tl.program_id(0)
    group = program % groups
    channels = groups * group_width
    cells = frames * chunks * group_width
    base = (program // groups).to(tl.int64) * frames * chunks * 2 * channels + group * group_width
    number = tl.cast(frames, tl.float32) * rows * group_width
    # Means as distances from the first one: the sum of large means would be rounded.
    pivot = tl.load(moments_ptr + base)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        real = cell < cells
        part = cell // group_width
        at = base + part.to(tl.int64) * 2 * channels + cell % group_width
        count = tl.minimum(rows - part % chunks * chunk, chunk).to(tl.float32)
        distance = tl.load(moments_ptr + at, mask=real, other=0.0) - pivot
        total += tl.where(real, distance * count, 0.0)
    mean = pivot + tl.sum(total, axis=0) / number
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        real = cell < cells
        part = cell // group_width
        at = base + part.to(tl.int64) * 2 * channels + cell % group_width
        count = tl.minimum(rows - part % chunks * chunk, chunk).to(tl.float32)
        distance = tl.load(moments_ptr + at, mask=real, other=0.0) - mean
        squares = tl.load(moments_ptr + at + channels, mask=real, other=0.0)
        total += tl.where(real, squares + distance * distance * count, 0.0)
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, 1.0 / tl.sqrt(tl.sum(total, axis=0) / number + eps))


@kernel(
    specialize=(
        "stride_x_b", "stride_x_t", "stride_x_h", "stride_x_w", "stride_scale_b", "stride_scale_t", "stride_shift_b",
        "stride_shift_t", "channels",
    )
)  # fmt: skip
def group_norm_act_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, out_ptr,
    stride_x_b, stride_x_t, stride_x_h, stride_x_w, stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t,
    frames, height, width, channels, group_width, statistics, front_t, front_h, front_w,
    out_frames, out_width, out_rows, chunks, chunk,
    MODULATED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A chunk of the result's rows: the result is contiguous, and its edges repeat the input's."""
    frame, _, first, last, channel = _place(chunks, chunk, out_rows, channels, BLOCK_C)
    wide = channel < channels
    b = frame // out_frames
    t = tl.minimum(tl.maximum(frame % out_frames - front_t, 0), frames - 1)
    gain, offset = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, t, channel, wide,
        stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t, MODULATED,
    )  # fmt: skip
    of_group = (b * statistics + tl.minimum(t, statistics - 1)) * (channels // group_width) + channel // group_width
    mean = tl.load(mean_ptr + of_group, mask=wide, other=0.0)
    gain *= tl.load(rstd_ptr + of_group, mask=wide, other=0.0)
    base = b.to(tl.int64) * stride_x_b + t.to(tl.int64) * stride_x_t
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & wide[None, :]
        h = tl.minimum(tl.maximum(row // out_width - front_h, 0), height - 1)
        w = tl.minimum(tl.maximum(row % out_width - front_w, 0), width - 1)
        x = _pixels(x_ptr, base, h, w, channel, stride_x_h, stride_x_w, inside)
        z = (x - mean[None, :]) * gain[None, :] + offset[None, :]
        if SILU:
            z = z * _sigmoid(z)
        to = out_ptr + (frame.to(tl.int64) * out_rows + row)[:, None] * channels + channel[None, :]
        tl.store(to, z.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _repeated(i, n, front, padded):
    """The first and the last place that position ``i`` of ``n`` has in the padded result."""
    return tl.where(i == 0, 0, i + front), tl.where(i == n - 1, padded - 1, i + front)


@jit
def _folded(
    grad_ptr, b, t, h, w, channel, stride_b, stride_t, stride_h, stride_w, frames, height, width,
    front_t, front_h, front_w, out_frames, out_height, out_width, real, inside,
    PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of pixels of a frame: the sum over all places that repeat them, ``[ROWS, BLOCK_C]`` in fp32."""
    base = b.to(tl.int64) * stride_b
    if PAD:
        total = tl.zeros((ROWS, BLOCK_C), tl.float32)
        first_t, last_t = _repeated(t, frames, front_t, out_frames)
        first_h, last_h = _repeated(h, height, front_h, out_height)
        first_w, last_w = _repeated(w, width, front_w, out_width)
        # Within a frame most rows are in one place: no more turns than one of this tile's rows needs.
        turns_h = 1 + tl.max(tl.where(real, last_h - first_h, 0), axis=0)
        turns_w = 1 + tl.max(tl.where(real, last_w - first_w, 0), axis=0)
        # One loop: what three of them keep in registers made the compiler spill some.
        for place in range(0, (1 + last_t - first_t) * turns_h * turns_w):
            at = base + (first_t + place // (turns_h * turns_w)).to(tl.int64) * stride_t
            i, j = first_h + place // turns_w % turns_h, first_w + place % turns_w
            valid = inside & ((i <= last_h) & (j <= last_w))[:, None]
            total += _pixels(grad_ptr, at, i, j, channel, stride_h, stride_w, valid)
    else:
        total = _pixels(grad_ptr, base + t.to(tl.int64) * stride_t, h, w, channel, stride_h, stride_w, inside)
    return total


@kernel(
    specialize=(
        "stride_grad_b", "stride_grad_t", "stride_grad_h", "stride_grad_w", "stride_x_b", "stride_x_t", "stride_x_h",
        "stride_x_w", "stride_scale_b", "stride_scale_t", "stride_shift_b", "stride_shift_t", "channels",
    )
)  # fmt: skip
def group_norm_act_sums_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, sums_ptr,
    stride_grad_b, stride_grad_t, stride_grad_h, stride_grad_w, stride_x_b, stride_x_t, stride_x_h, stride_x_w,
    stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t,
    frames, height, width, channels, group_width, statistics, front_t, front_h, front_w,
    out_frames, out_height, out_width, chunks, chunk,
    MODULATED: tl.constexpr, SILU: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of a chunk of rows and each channel: sums of the gradient before SiLU, and of it times the normalized ``x``."""
    rows = height * width
    frame, part, first, last, channel = _place(chunks, chunk, rows, channels, BLOCK_C)
    wide = channel < channels
    b, t = frame // frames, frame % frames
    gain, offset = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, t, channel, wide,
        stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t, MODULATED,
    )  # fmt: skip
    of_group = (b * statistics + tl.minimum(t, statistics - 1)) * (channels // group_width) + channel // group_width
    mean = tl.load(mean_ptr + of_group, mask=wide, other=0.0)
    rstd = tl.load(rstd_ptr + of_group, mask=wide, other=0.0)
    base = b.to(tl.int64) * stride_x_b + t.to(tl.int64) * stride_x_t
    sum_shift = tl.zeros((ROWS, BLOCK_C), tl.float32)
    sum_scale = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < last
        inside = real[:, None] & wide[None, :]
        h, w = row // width, row % width
        dz = _folded(
            grad_ptr, b, t, h, w, channel, stride_grad_b, stride_grad_t, stride_grad_h, stride_grad_w, frames, height,
            width, front_t, front_h, front_w, out_frames, out_height, out_width, real, inside, PAD, ROWS, BLOCK_C,
        )  # fmt: skip
        x = _pixels(x_ptr, base, h, w, channel, stride_x_h, stride_x_w, inside)
        normal = tl.where(inside, (x - mean[None, :]) * rstd[None, :], 0.0)
        if SILU:
            z = normal * gain[None, :] + offset[None, :]
            s = _sigmoid(z)
            dz *= s + z * s * (1.0 - s)
        sum_shift += dz
        sum_scale += dz * normal
    to = sums_ptr + (frame.to(tl.int64) * chunks + part) * 2 * channels + channel
    tl.store(to, tl.sum(sum_shift, axis=0), mask=wide)
    tl.store(to + channels, tl.sum(sum_scale, axis=0), mask=wide)


@kernel()
def group_gradients_kernel(
    sums_ptr, weight_ptr, bias_ptr, scale_ptr, means_ptr, dvectors_ptr, dscale_ptr, dshift_ptr,
    stride_scale_b, stride_scale_t, groups, group_width, frames, statistics, scales, rows,
    MODULATED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of one sample and group: the means that the gradient of ``x`` needs, and the gradients of the vectors.

    Sums are ``[B, T, 2, C]``, means ``[B, S, G, 2]``, ``dvectors`` for weight and bias ``[B, 2, C]``, ``dscale`` and
    ``dshift`` ``[B, 1 or T, C]``. Where several frames have one mean or vector, each of them writes the sum so far.
    """
    program = tl.program_id(0)
    b = program // groups
    group = program % groups
    channels = groups * group_width
    number = tl.cast(rows, tl.float32) * tl.where(statistics == 1, frames, 1) * group_width
    mean_shift = 0.0
    mean_scale = 0.0
    for t in range(0, frames):
        mean_shift = tl.where(statistics == 1, mean_shift, 0.0)
        mean_scale = tl.where(statistics == 1, mean_scale, 0.0)
        of_frame = b.to(tl.int64) * stride_scale_b + tl.cast(t, tl.int64) * stride_scale_t
        for block in range(0, group_width, BLOCK_C):
            inner = block + tl.arange(0, BLOCK_C)
            wide = inner < group_width
            channel = group * group_width + inner
            gain = tl.load(weight_ptr + channel, mask=wide, other=0.0).to(tl.float32)
            if MODULATED:
                gain = gain * (1.0 + _vector(scale_ptr, of_frame, channel, wide))
            at = sums_ptr + (b.to(tl.int64) * frames + t) * 2 * channels + channel
            mean_shift += tl.sum(tl.load(at, mask=wide, other=0.0) * gain, axis=0)
            mean_scale += tl.sum(tl.load(at + channels, mask=wide, other=0.0) * gain, axis=0)
        to = means_ptr + ((b * statistics + tl.minimum(t, statistics - 1)) * groups + group) * 2
        tl.store(to, mean_shift / number)
        tl.store(to + 1, mean_scale / number)
    for block in range(0, group_width, BLOCK_C):
        inner = block + tl.arange(0, BLOCK_C)
        wide = inner < group_width
        channel = group * group_width + inner
        weight = tl.load(weight_ptr + channel, mask=wide, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + channel, mask=wide, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK_C,), tl.float32)
        dbias = tl.zeros((BLOCK_C,), tl.float32)
        dscale = tl.zeros((BLOCK_C,), tl.float32)
        dshift = tl.zeros((BLOCK_C,), tl.float32)
        for t in range(0, frames):
            at = sums_ptr + (b.to(tl.int64) * frames + t) * 2 * channels + channel
            of_shift = tl.load(at, mask=wide, other=0.0)
            of_scale = tl.load(at + channels, mask=wide, other=0.0)
            if MODULATED:
                dscale = tl.where(scales == 1, dscale, 0.0) + of_scale * weight + of_shift * bias
                dshift = tl.where(scales == 1, dshift, 0.0) + of_shift
                to = (b.to(tl.int64) * scales + tl.minimum(t, scales - 1)) * channels + channel
                tl.store(dscale_ptr + to, dscale.to(dscale_ptr.dtype.element_ty), mask=wide)
                tl.store(dshift_ptr + to, dshift.to(dshift_ptr.dtype.element_ty), mask=wide)
                of_frame = b.to(tl.int64) * stride_scale_b + tl.cast(t, tl.int64) * stride_scale_t
                factor = 1.0 + _vector(scale_ptr, of_frame, channel, wide)
                of_shift *= factor
                of_scale *= factor
            dweight += of_scale
            dbias += of_shift
        to = dvectors_ptr + b.to(tl.int64) * 2 * channels + channel
        tl.store(to, dweight, mask=wide)
        tl.store(to + channels, dbias, mask=wide)


@kernel(
    specialize=(
        "stride_grad_b", "stride_grad_t", "stride_grad_h", "stride_grad_w", "stride_x_b", "stride_x_t", "stride_x_h",
        "stride_x_w", "stride_scale_b", "stride_scale_t", "stride_shift_b", "stride_shift_t", "channels",
    )
)  # fmt: skip
def group_norm_act_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean_ptr, rstd_ptr, means_ptr, dx_ptr,
    stride_grad_b, stride_grad_t, stride_grad_h, stride_grad_w, stride_x_b, stride_x_t, stride_x_h, stride_x_w,
    stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t,
    frames, height, width, channels, group_width, statistics, front_t, front_h, front_w,
    out_frames, out_height, out_width, chunks, chunk,
    MODULATED: tl.constexpr, SILU: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A chunk of rows of the gradient of ``x``, which is contiguous."""
    rows = height * width
    frame, _, first, last, channel = _place(chunks, chunk, rows, channels, BLOCK_C)
    wide = channel < channels
    b, t = frame // frames, frame % frames
    gain, offset = _affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, t, channel, wide,
        stride_scale_b, stride_scale_t, stride_shift_b, stride_shift_t, MODULATED,
    )  # fmt: skip
    of_group = (b * statistics + tl.minimum(t, statistics - 1)) * (channels // group_width) + channel // group_width
    mean = tl.load(mean_ptr + of_group, mask=wide, other=0.0)
    rstd = tl.load(rstd_ptr + of_group, mask=wide, other=0.0)
    mean_shift = tl.load(means_ptr + of_group * 2, mask=wide, other=0.0)
    mean_scale = tl.load(means_ptr + of_group * 2 + 1, mask=wide, other=0.0)
    base = b.to(tl.int64) * stride_x_b + t.to(tl.int64) * stride_x_t
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < last
        inside = real[:, None] & wide[None, :]
        h, w = row // width, row % width
        dz = _folded(
            grad_ptr, b, t, h, w, channel, stride_grad_b, stride_grad_t, stride_grad_h, stride_grad_w, frames, height,
            width, front_t, front_h, front_w, out_frames, out_height, out_width, real, inside, PAD, ROWS, BLOCK_C,
        )  # fmt: skip
        x = _pixels(x_ptr, base, h, w, channel, stride_x_h, stride_x_w, inside)
        normal = (x - mean[None, :]) * rstd[None, :]
        if SILU:
            z = normal * gain[None, :] + offset[None, :]
            s = _sigmoid(z)
            dz *= s + z * s * (1.0 - s)
        dx = (dz * gain[None, :] - mean_shift[None, :] - normal * mean_scale[None, :]) * rstd[None, :]
        to = dx_ptr + (frame.to(tl.int64) * rows + row)[:, None] * channels + channel[None, :]
        tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=inside)
