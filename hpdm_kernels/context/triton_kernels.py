"""Kernels of the context ops; ``triton_backend`` launches them, ``geometry`` explains the formulas.

Once per call ``_context_geometry_kernel`` writes three small tables on the device, which hold everything that depends
on boxes and sizes:

    footprint_table  [B, K, 10] int32   start f, h, w; footprint f, h, w; source grid f, h, w; row of the source
    position_table   [B, K, 6]  fp32    position of token 0 in the footprint f, h, w; step f, h, w
    address_table    [B, K, 4]  int64   address of the footprint's first token; elements to the next token f, h, w

So the number of sources is a loop bound and not a constant of the kernel, the host never synchronizes, and footprints
are read in place: from the source itself, from cached projections, or from a separate buffer. All kernels gather: there
are no atomics, and every sum has a fixed order.

Pointer arguments, besides the tables, unless a kernel's docstring says otherwise:

    box         [B, 6] fp32     the patches' boxes
    x, out      [B, N, D]       tokens of the patches; N = n_f * n_h * n_w
    grad        [B, N, D]       gradient of such tokens, contiguous
    weight      [D, D]          the fusion weight's columns for x; output i is row i
    coordinate  [D, 3]          the fusion weight's columns for the coordinates; unused without HAS_COORDINATES
    bias        [D]             unused without HAS_BIAS

K is the number of sources and k one of them. In names, n is the patch's tokens per axis, m the source's, p the
footprint's.

Grids have one axis, which may have 2**31 - 1 programs; CUDA limits the others to 65,535. So a kernel takes the number
of its program apart; ``_block_of_program`` does it for kernels that work on samples.

Triton turns integer arguments equal to 1 into Python ints, which have no ``.to``. So sizes and strides are converted by
``* 1.0`` and ``tl.cast``.
"""

from __future__ import annotations

from hpdm_kernels._triton import jit, tl


@jit
def _block_of_program(size, BLOCK: tl.constexpr, columns, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """What this program works on: the first of its ``BLOCK`` rows, the first of its ``BLOCK_D`` columns, the sample.

    ``size`` and ``columns`` are the rows and columns of a sample. Blocks of rows vary fastest, samples slowest.
    """
    blocks, blocks_d = tl.cdiv(size, BLOCK), tl.cdiv(columns, BLOCK_D)
    pid = tl.program_id(0)
    return pid % blocks * BLOCK, pid // blocks % blocks_d * BLOCK_D, pid // blocks // blocks_d


@jit
def _context_geometry_kernel(  # type: ignore[no-untyped-def]
    box_ptr, source_box_ptr, index_ptr, footprint_table_ptr, position_table_ptr, address_table_ptr,
    k, K, n_f, n_h, n_w, m_f, m_h, m_w, p_f, p_h, p_w, address, stride_row, stride_token, itemsize,
    HAS_INDEX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the tables' rows of source ``k``, one sample per program, in fp64, so that only storing rounds.

    ``address`` is that of the source ``[B_k, N_k, D]`` (``WHOLE``), or of the samples' footprints ``[B, P, D]``.
    ``source_box [B_k, 6]`` fp32 holds the source's boxes, ``index [B, K]`` the row that each sample reads (unused
    without HAS_INDEX).
    """
    b = tl.program_id(0)
    row = tl.load(index_ptr + b * K + k).to(tl.int32) if HAS_INDEX else b
    axis = tl.arange(0, 4)
    real = axis < 3
    n = tl.where(axis == 0, n_f, tl.where(axis == 1, n_h, n_w)).to(tl.float64)
    grid = tl.where(axis == 0, m_f, tl.where(axis == 1, m_h, m_w))
    size = tl.where(axis == 0, p_f, tl.where(axis == 1, p_h, p_w))
    m = grid.to(tl.float64)
    box = box_ptr + b * 6 + axis
    source_box = source_box_ptr + row.to(tl.int64) * 6 + axis
    source_scale = tl.load(source_box + 3, mask=real, other=1.0).to(tl.float64)
    offset = tl.load(box, mask=real, other=0.0).to(tl.float64)
    offset = (offset - tl.load(source_box, mask=real, other=0.0).to(tl.float64)) / source_scale
    scale = tl.load(box + 3, mask=real, other=1.0).to(tl.float64) / source_scale
    first = (offset + scale * 0.5 / n) * m - 0.5
    start = tl.minimum(tl.maximum(tl.floor(first), 0.0), (grid - size).to(tl.float64))
    position = position_table_ptr + (b * K + k) * 6 + axis
    tl.store(position, (first - start).to(tl.float32), mask=real)
    tl.store(position + 3, (scale * m / n).to(tl.float32), mask=real)
    footprint = footprint_table_ptr + (b * K + k) * 10 + axis
    tl.store(footprint, start.to(tl.int32), mask=real)
    tl.store(footprint + 3, size, mask=real)
    tl.store(footprint + 6, grid, mask=real)
    tl.store(footprint_table_ptr + (b * K + k) * 10 + 9, row)
    line = m_w if WHOLE else p_w
    frame = m_h * m_w if WHOLE else p_h * p_w
    stride = tl.where(axis == 0, frame, tl.where(axis == 1, line, 1)).to(tl.int64) * stride_token
    skipped = tl.cast(row if WHOLE else b, tl.int64) * stride_row
    if WHOLE:
        skipped += tl.sum(tl.where(real, start.to(tl.int64) * stride, 0), axis=0)
    addresses = address_table_ptr + (b * K + k) * 4
    tl.store(addresses, address + skipped * itemsize)
    tl.store(addresses + 1 + axis, stride, mask=real)


@jit
def _context_gather_kernel(  # type: ignore[no-untyped-def]
    source_ptr, out_ptr, footprint_table_ptr, k, K, P, D, stride_source_b, stride_source_n,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Copies a block of one sample's footprint tokens: ``source [B_k, N_k, D] -> out [B, P, D]``, contiguous."""
    first_j, first_d, b = _block_of_program(P, BLOCK_T, D, BLOCK_D)
    j, d = first_j + tl.arange(0, BLOCK_T), first_d + tl.arange(0, BLOCK_D)
    footprint = footprint_table_ptr + (b * K + k) * 10
    p_h, p_w = tl.load(footprint + 4), tl.load(footprint + 5)
    f = tl.load(footprint) + j // (p_h * p_w)
    h = tl.load(footprint + 1) + j // p_w % p_h
    w = tl.load(footprint + 2) + j % p_w
    token = (f * tl.load(footprint + 7) + h) * tl.load(footprint + 8) + w
    mask = (j < P)[:, None] & (d < D)[None, :]
    source = source_ptr + tl.load(footprint + 9).to(tl.int64) * stride_source_b + token.to(tl.int64) * stride_source_n
    value = tl.load(source[:, None] + d[None, :], mask=mask, other=0.0)
    out = out_ptr + (b.to(tl.int64) * P + j) * D
    tl.store(out[:, None] + d[None, :], value, mask=mask)


@jit
def _context_scatter_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, out_ptr, footprint_table_ptr, k, K, B, N, P, D,
    HAS_INDEX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Transpose of the gather, ``grad [B, P, D] -> out [B_k, N_k, D]``, a block of one row's source tokens per program.

    Each token sums, in order, over the samples whose footprint contains it. Both tensors are contiguous.
    """
    first_t, first_d, row = _block_of_program(N, BLOCK_T, D, BLOCK_D)
    t, d = first_t + tl.arange(0, BLOCK_T), first_d + tl.arange(0, BLOCK_D)
    m_h, m_w = tl.load(footprint_table_ptr + k * 10 + 7), tl.load(footprint_table_ptr + k * 10 + 8)
    f, h, w = t // (m_h * m_w), t // m_w % m_h, t % m_w
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    first_sample = 0 if HAS_INDEX else row
    for i in range(B if HAS_INDEX else 1):
        b = first_sample + i
        footprint = footprint_table_ptr + (b * K + k) * 10
        # A sample that reads another row of the source has no footprint in this row.
        p_f = tl.where(tl.load(footprint + 9) == row, tl.load(footprint + 3), 0)
        p_h, p_w = tl.load(footprint + 4), tl.load(footprint + 5)
        j_f, j_h, j_w = f - tl.load(footprint), h - tl.load(footprint + 1), w - tl.load(footprint + 2)
        inside = (j_f >= 0) & (j_f < p_f) & (j_h >= 0) & (j_h < p_h) & (j_w >= 0) & (j_w < p_w) & (t < N)
        grad = grad_ptr + (tl.cast(b, tl.int64) * P + (j_f * p_h + j_h) * p_w + j_w) * D
        acc += tl.load(grad[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    out = out_ptr + (row.to(tl.int64) * N + t) * D
    tl.store(out[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=(t < N)[:, None] & (d < D)[None, :])


@jit
def _token_position(position, footprint, AXIS: tl.constexpr, i):  # type: ignore[no-untyped-def]
    """Positions of tokens ``i`` of one axis in the footprint; the clamp is the border padding.

    ``position`` and ``footprint`` point to the rows of the tables for one sample and source.
    """
    u = tl.load(position + AXIS) + i.to(tl.float32) * tl.load(position + 3 + AXIS)
    return tl.minimum(tl.maximum(u, 0.0), (tl.load(footprint + 3 + AXIS) - 1).to(tl.float32))


@jit
def _axis_taps(position, footprint, AXIS: tl.constexpr, i):  # type: ignore[no-untyped-def]
    """Lower footprint token, upper footprint token and weight of the upper one, for tokens ``i`` of one axis."""
    u = _token_position(position, footprint, AXIS, i)
    low = u.to(tl.int32)
    return low, tl.minimum(low + 1, tl.load(footprint + 3 + AXIS) - 1), u - low.to(tl.float32)


@jit
def _context_tile(  # type: ignore[no-untyped-def]
    position_table_ptr, footprint_table_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
    b, K, D, n_f, n_h, n_w, first_line, first_w, first_d,
    HAS_BIAS: tl.constexpr, HAS_COORDINATES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean over sources of trilinear samples, plus coordinates and bias: fp32 ``[BLOCK_W, BLOCK_L, BLOCK_D]``.

    Works on lines of tokens along the width. For each width position that a line needs, source tokens are summed over
    the frame and height taps once; every token of the line then adds this sum with its hat weight. At relative scale
    1/2 eight tokens need at most six sums, which read 24 rows, while their corners are 64 rows. The loop over these
    sums must not be unrolled, or registers spill.
    """
    line = first_line + tl.arange(0, BLOCK_L)
    w = first_w + tl.arange(0, BLOCK_W)
    d = first_d + tl.arange(0, BLOCK_D)
    f, h = line // n_h, line % n_h
    mask = (f < n_f)[None, :, None] & (d < D)[None, None, :]
    share = 1.0 / (K * 1.0)
    acc = tl.zeros((BLOCK_W, BLOCK_L, BLOCK_D), dtype=tl.float32)
    for k in range(K):
        position, footprint = position_table_ptr + (b * K + k) * 6, footprint_table_ptr + (b * K + k) * 10
        addresses = address_table_ptr + (b * K + k) * 4
        origin = tl.load(addresses).to(tl.pointer_type(out_ptr.dtype.element_ty))
        stride_f, stride_h, stride_w = tl.load(addresses + 1), tl.load(addresses + 2), tl.load(addresses + 3)
        if ALIGNED:
            # Tells the compiler that these numbers, which are read from memory, are multiples of 16: it then loads 16
            # bytes at a time.
            origin, stride_f = tl.multiple_of(origin, 16), tl.multiple_of(stride_f, 16)
            stride_h, stride_w = tl.multiple_of(stride_h, 16), tl.multiple_of(stride_w, 16)
        f_0, f_1, t_f = _axis_taps(position, footprint, 0, f)
        h_0, h_1, t_h = _axis_taps(position, footprint, 1, h)
        low, _, _ = _axis_taps(position, footprint, 2, first_w)
        _, high, _ = _axis_taps(position, footprint, 2, tl.minimum(first_w + BLOCK_W, n_w) - 1)
        u = _token_position(position, footprint, 2, w)
        for j in range(low, high + 1):
            value = tl.zeros((1, BLOCK_L, BLOCK_D), dtype=tl.float32)
            for tap in tl.static_range(4):
                row = (f_1 if tap >= 2 else f_0) * stride_f + (h_1 if tap % 2 == 1 else h_0) * stride_h + j * stride_w
                weight = share * (t_f if tap >= 2 else 1.0 - t_f) * (t_h if tap % 2 == 1 else 1.0 - t_h)
                rows = tl.load(origin + row[None, :, None] + d[None, None, :], mask=mask, other=0.0)
                value += weight[None, :, None] * rows.to(tl.float32)
            acc += tl.maximum(1.0 - tl.abs(u - j), 0.0)[:, None, None] * value
    if HAS_COORDINATES:
        for axis in tl.static_range(3):
            i = f if axis == 0 else (h if axis == 1 else w)
            n = n_f if axis == 0 else (n_h if axis == 1 else n_w)
            box = box_ptr + b * 6 + axis
            c = tl.load(box) + tl.load(box + 3) * ((i.to(tl.float32) + 0.5) / (n * 1.0))
            column = tl.load(coordinate_ptr + d * 3 + axis, mask=d < D, other=0.0).to(tl.float32)
            acc += (c[:, None, None] if axis == 2 else c[None, :, None]) * column[None, None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, None, :]
    return acc


@jit
def _add_context_kernel(  # type: ignore[no-untyped-def]
    position_table_ptr, footprint_table_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
    K, D, n_f, n_h, n_w,
    ONTO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COORDINATES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes a block of one sample's context, coordinates and bias to ``out``; ``ONTO``: adds it to ``out``."""
    blocks_w = tl.cdiv(n_w, BLOCK_W)
    block, first_d, b = _block_of_program(tl.cdiv(n_f * n_h, BLOCK_L) * blocks_w, 1, D, BLOCK_D)
    first_line, first_w = block // blocks_w * BLOCK_L, block % blocks_w * BLOCK_W
    acc = _context_tile(
        position_table_ptr, footprint_table_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
        b, K, D, n_f, n_h, n_w, first_line, first_w, first_d,
        HAS_BIAS, HAS_COORDINATES, ALIGNED, BLOCK_W, BLOCK_L, BLOCK_D,
    )  # fmt: skip
    line = first_line + tl.arange(0, BLOCK_L)[None, :, None]
    w = first_w + tl.arange(0, BLOCK_W)[:, None, None]
    d = first_d + tl.arange(0, BLOCK_D)[None, None, :]
    lines = tl.cast(n_f, tl.int64) * n_h
    mask = (line < lines) & (w < n_w) & (d < D)
    out = out_ptr + ((b * lines + line) * n_w + w) * D + d
    if ONTO:
        acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _fuse_context_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, position_table_ptr, footprint_table_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr,
    out_ptr,
    K, D, n_f, n_h, n_w, stride_x_b, stride_x_n, stride_weight,
    HAS_BIAS: tl.constexpr, HAS_COORDINATES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = x @ weight.T`` plus context, coordinates and bias; one block of one sample per program.

    The accumulator starts with the context. Adding the context at the end would keep both in registers at once.
    """
    blocks_w = tl.cdiv(n_w, BLOCK_W)
    # Blocks of columns vary fastest: neighboring programs share tokens, so that their rows of x and of the sources are
    # still in the L2 cache.
    first_d, block, b = _block_of_program(D, BLOCK_D, tl.cdiv(n_f * n_h, BLOCK_L) * blocks_w, 1)
    first_line, first_w = block // blocks_w * BLOCK_L, block % blocks_w * BLOCK_W
    acc = _context_tile(
        position_table_ptr, footprint_table_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
        b, K, D, n_f, n_h, n_w, first_line, first_w, first_d,
        HAS_BIAS, HAS_COORDINATES, True, BLOCK_W, BLOCK_L, BLOCK_D,
    )  # fmt: skip
    acc = tl.reshape(acc, (BLOCK_W * BLOCK_L, BLOCK_D))
    row = tl.arange(0, BLOCK_W * BLOCK_L)
    line, w = first_line + row % BLOCK_L, first_w + row // BLOCK_L
    lines = tl.cast(n_f, tl.int64) * n_h
    real = (line < lines) & (w < n_w)
    t = line.to(tl.int64) * n_w + w
    d = first_d + tl.arange(0, BLOCK_D)
    inner = tl.arange(0, BLOCK_K)
    x = x_ptr + b.to(tl.int64) * stride_x_b + t[:, None] * stride_x_n + inner[None, :]
    weight = weight_ptr + d.to(tl.int64)[None, :] * stride_weight + inner[:, None]
    for start in range(0, D, BLOCK_K):
        left = inner < D - start
        x_tile = tl.load(x + start, mask=real[:, None] & left[None, :], other=0.0)
        weight_tile = tl.load(weight + start, mask=left[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
    out = out_ptr + (b * lines * n_w + t) * D
    tl.store(out[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@jit
def _context_contract_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, out_ptr, position_table_ptr, k, K, rows, per_sample, n, p, width, AXIS: tl.constexpr, MEAN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Transposed interpolation along one axis, ``grad [outer, n, width] -> out [outer, p, width]``, both contiguous.

    A program works on a block of the ``outer * p`` rows of the result. Footprint token ``j`` sums over the tokens whose
    positions are less than one away, a range in closed form; a border token also over all tokens beyond it.
    """
    blocks_d = tl.cdiv(width, BLOCK_D)
    r = tl.program_id(0) // blocks_d * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    real = r < rows
    outer, j = r // p, r % p
    position = position_table_ptr + ((outer // per_sample) * K + k) * 6 + AXIS
    first = tl.load(position, mask=real, other=0.0)
    step = tl.load(position + 3, mask=real, other=1.0)
    # One more token on either side, because of rounding; tokens outside the range get weight 0.
    low = tl.where(j == 0, 0, tl.minimum(tl.maximum(tl.ceil((j - 1 - first) / step) - 1.0, 0.0), n).to(tl.int32))
    high = tl.floor((j + 1 - first) / step) + 1.0
    high = tl.where(j == p - 1, n - 1, tl.minimum(tl.maximum(high, -1.0), n - 1).to(tl.int32))
    high = tl.where(real, high, -1)
    count = tl.max(high - low, axis=0) + 1
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    grad = grad_ptr + outer.to(tl.int64) * n * width
    for c in range(count):
        i = low + c
        u = tl.minimum(tl.maximum(first + i.to(tl.float32) * step, 0.0), (p - 1) * 1.0)
        weight = tl.maximum(1.0 - tl.abs(u - j.to(tl.float32)), 0.0)
        mask = (i <= high)[:, None] & (d < width)[None, :]
        value = tl.load((grad + i.to(tl.int64) * width)[:, None] + d[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * value.to(tl.float32)
    if MEAN:
        acc = acc / (K * 1.0)
    out = out_ptr + r.to(tl.int64) * width
    tl.store(out[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < width)[None, :])


@jit
def _coordinate_sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, box_ptr, out_ptr, N, D, n_f, n_h, n_w, chunk, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """``out [B, chunks, 4, D]`` fp32: sums of grad over a chunk of tokens, weighted by the coordinates, and by 1."""
    chunks = tl.cdiv(N, chunk)
    chunk_id, first_d, b = _block_of_program(chunks, 1, D, BLOCK_D)
    d = first_d + tl.arange(0, BLOCK_D)
    box = box_ptr + b * 6
    o_f, o_h, o_w = tl.load(box), tl.load(box + 1), tl.load(box + 2)
    s_f, s_h, s_w = tl.load(box + 3), tl.load(box + 4), tl.load(box + 5)
    zero = tl.zeros((BLOCK_D,), dtype=tl.float32)
    by_f, by_h, by_w, total = zero, zero, zero, zero
    for begin in range(chunk_id * chunk, tl.minimum((chunk_id + 1) * chunk, N), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        mask = ((t < N) & (t < (chunk_id + 1) * chunk))[:, None] & (d < D)[None, :]
        grad = grad_ptr + (b.to(tl.int64) * N + t) * D
        value = tl.load(grad[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        c_f = o_f + s_f * (((t // (n_h * n_w)).to(tl.float32) + 0.5) / (n_f * 1.0))
        c_h = o_h + s_h * (((t // n_w % n_h).to(tl.float32) + 0.5) / (n_h * 1.0))
        c_w = o_w + s_w * (((t % n_w).to(tl.float32) + 0.5) / (n_w * 1.0))
        by_f += tl.sum(c_f[:, None] * value, axis=0)
        by_h += tl.sum(c_h[:, None] * value, axis=0)
        by_w += tl.sum(c_w[:, None] * value, axis=0)
        total += tl.sum(value, axis=0)
    out = out_ptr + (b.to(tl.int64) * chunks + chunk_id) * 4 * D + d
    tl.store(out, by_f, mask=d < D)
    tl.store(out + D, by_h, mask=d < D)
    tl.store(out + 2 * D, by_w, mask=d < D)
    tl.store(out + 3 * D, total, mask=d < D)


@jit
def _context_matmul_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, out_ptr, M, N, K, stride_a_m, stride_a_k, stride_b_k, stride_b_n, stride_out_m,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out [M, N] = a [M, K] @ b [K, N]``, any strides of a and b, in precisions that PyTorch does not offer."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a = a_ptr + m.to(tl.int64)[:, None] * stride_a_m + k.to(tl.int64)[None, :] * stride_a_k
    b = b_ptr + k.to(tl.int64)[:, None] * stride_b_k + n.to(tl.int64)[None, :] * stride_b_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        left = k < K - start
        a_tile = tl.load(a, mask=(m < M)[:, None] & left[None, :], other=0.0)
        b_tile = tl.load(b, mask=left[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a += BLOCK_K * tl.cast(stride_a_k, tl.int64)
        b += BLOCK_K * tl.cast(stride_b_k, tl.int64)
    out = out_ptr + m.to(tl.int64)[:, None] * stride_out_m + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
