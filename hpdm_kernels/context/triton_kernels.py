"""Kernels of the context ops; ``triton_backend`` launches them, ``geometry`` explains the formulas.

``_context_geometry_kernel`` writes two small tables on the device, which hold everything that depends on boxes and
sizes. The backward uses the plan of the forward. The addresses are used at once: tensors may move before the backward.

    plan           [B, K, 16] int32   columns 0-2: start f, h, w; 3-5: footprint f, h, w; 6-8: source grid f, h, w;
                                      9: row of the source; 10-12: position of token 0 in the footprint f, h, w;
                                      13-15: step f, h, w. Positions and steps are the bits of fp32 numbers.
    address_table  [B, K, 4] int64    address of the footprint's first token; elements to the next token f, h, w

So the number of sources is a loop bound and not a constant of the kernel, the host never synchronizes, and footprints
are read in place: from the source itself, from cached projections, or from a separate buffer. All kernels gather: there
are no atomics, and every sum has a fixed order.

Pointer arguments, besides the tables, unless a kernel's docstring says otherwise:

    box         [B, 6] fp32     the patches' boxes
    x, out      [B, N, D]       tokens of the patches; N = n_f * n_h * n_w
    grad        [B, N, D]       gradient of such tokens, contiguous
    weight      [D, D]          the fusion weight's columns for x; output i is row i
    coordinate  [3, D]          the fusion weight's columns for the coordinates; unused without HAS_COORDINATES
    bias        [D]             unused without HAS_BIAS

K is the number of sources and k one of them. In names, n is the patch's tokens per axis, m the source's, p the
footprint's. P is the tokens of a sample's footprint.

Kernels that read or write the sources' tensors serve up to three sources in one launch, as many as the paper's
pyramids have. Such arguments are numbered: ``k_1`` is the source that is second in the launch. Sources that a launch
does not have get no programs.

Grids have one axis, which may have 2**31 - 1 programs; CUDA limits the others to 65,535. So a kernel takes the number
of its program apart; ``_block_of_program`` does it for kernels that work on samples.

Triton turns integer arguments equal to 1 into Python ints, which have no ``.to``. So sizes and strides are converted by
``* 1.0`` and ``tl.cast``.
"""

from __future__ import annotations

from hpdm_kernels._tf32 import as_operand
from hpdm_kernels._triton import jit, kernel, tl


@jit
def _block_of_program(pid, size, BLOCK: tl.constexpr, columns, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """What program ``pid`` works on: the first of its ``BLOCK`` rows, the first of its ``BLOCK_D`` columns, the sample.

    ``size`` and ``columns`` are the rows and columns of a sample. Blocks of rows vary fastest, samples slowest.
    """
    blocks, blocks_d = tl.cdiv(size, BLOCK), tl.cdiv(columns, BLOCK_D)
    return pid % blocks * BLOCK, pid // blocks % blocks_d * BLOCK_D, pid // blocks // blocks_d


@jit
def _of_source(i, value_0, value_1, value_2):  # type: ignore[no-untyped-def]
    """The value of source ``i`` of the launch."""
    return tl.where(i == 0, value_0, tl.where(i == 1, value_1, value_2))


@jit
def _source_of_program(programs_0, programs_1):  # type: ignore[no-untyped-def]
    """Which source of the launch this program works on, and its number among the programs of that source.

    Each source has as many programs as said; the third has the others.
    """
    pid = tl.program_id(0)
    i = (pid >= programs_0).to(tl.int32) + (pid >= programs_0 + programs_1).to(tl.int32)
    return i, pid - _of_source(i, 0, programs_0, programs_0 + programs_1)


@jit
def _row_of_plan(plan_ptr, K, b, k):  # type: ignore[no-untyped-def]
    """Pointers to the plan's row of sample ``b`` and source ``k``: to its integers, and to its fp32 numbers."""
    row = plan_ptr + (b * K + k) * 16
    return row, (row + 10).to(tl.pointer_type(tl.float32))


@kernel()
def _context_geometry_kernel(  # type: ignore[no-untyped-def]
    box_ptr, index_ptr, plan_ptr, address_table_ptr, source_box_0_ptr, source_box_1_ptr, source_box_2_ptr,
    K, first_k, count, n_f, n_h, n_w, itemsize,
    whole_0, address_0, stride_row_0, stride_token_0, m_f_0, m_h_0, m_w_0, p_f_0, p_h_0, p_w_0,
    whole_1, address_1, stride_row_1, stride_token_1, m_f_1, m_h_1, m_w_1, p_f_1, p_h_1, p_w_1,
    whole_2, address_2, stride_row_2, stride_token_2, m_f_2, m_h_2, m_w_2, p_f_2, p_h_2, p_w_2,
    HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """Writes the tables' rows of sources ``first_k`` to ``first_k + count - 1``, in fp64, so that only storing rounds.

    A program writes the row of one sample and source. ``address`` is that of a source ``[B_k, N_k, D]`` if ``whole`` is
    1, else of the samples' footprints ``[B, P, D]``. ``source_box [B_k, 6]`` fp32 holds the source's boxes,
    ``index [B, K]`` the row that each sample reads (unused without HAS_INDEX).
    """
    b, i = tl.program_id(0) // count, tl.program_id(0) % count
    k = first_k + i
    whole = _of_source(i, whole_0, whole_1, whole_2) == 1
    m_f, m_h, m_w = (
        _of_source(i, m_f_0, m_f_1, m_f_2),
        _of_source(i, m_h_0, m_h_1, m_h_2),
        _of_source(i, m_w_0, m_w_1, m_w_2),
    )
    p_f, p_h, p_w = (
        _of_source(i, p_f_0, p_f_1, p_f_2),
        _of_source(i, p_h_0, p_h_1, p_h_2),
        _of_source(i, p_w_0, p_w_1, p_w_2),
    )
    row = tl.load(index_ptr + b * K + k).to(tl.int32) if HAS_INDEX else b
    axis = tl.arange(0, 4)
    real = axis < 3
    n = tl.where(axis == 0, n_f, tl.where(axis == 1, n_h, n_w)).to(tl.float64)
    grid = tl.where(axis == 0, m_f, tl.where(axis == 1, m_h, m_w))
    size = tl.where(axis == 0, p_f, tl.where(axis == 1, p_h, p_w))
    m = grid.to(tl.float64)
    box = box_ptr + b * 6 + axis
    source_box = _of_source(i, source_box_0_ptr, source_box_1_ptr, source_box_2_ptr) + row.to(tl.int64) * 6 + axis
    source_scale = tl.load(source_box + 3, mask=real, other=1.0).to(tl.float64)
    offset = tl.load(box, mask=real, other=0.0).to(tl.float64)
    offset = (offset - tl.load(source_box, mask=real, other=0.0).to(tl.float64)) / source_scale
    scale = tl.load(box + 3, mask=real, other=1.0).to(tl.float64) / source_scale
    first = (offset + scale * 0.5 / n) * m - 0.5
    start = tl.minimum(tl.maximum(tl.floor(first), 0.0), (grid - size).to(tl.float64))
    footprint, position = _row_of_plan(plan_ptr, K, b, k)
    tl.store(position + axis, (first - start).to(tl.float32), mask=real)
    tl.store(position + 3 + axis, (scale * m / n).to(tl.float32), mask=real)
    tl.store(footprint + axis, start.to(tl.int32), mask=real)
    tl.store(footprint + 3 + axis, size, mask=real)
    tl.store(footprint + 6 + axis, grid, mask=real)
    tl.store(footprint + 9, row)
    line, frame = tl.where(whole, m_w, p_w), tl.where(whole, m_h * m_w, p_h * p_w)
    stride_token = tl.cast(_of_source(i, stride_token_0, stride_token_1, stride_token_2), tl.int64)
    stride_row = tl.cast(_of_source(i, stride_row_0, stride_row_1, stride_row_2), tl.int64)
    stride = tl.where(axis == 0, frame, tl.where(axis == 1, line, 1)).to(tl.int64) * stride_token
    before = tl.sum(tl.where(real, start.to(tl.int64) * stride, 0), axis=0)
    skipped = tl.where(whole, row * stride_row + before, b * stride_row)
    addresses = address_table_ptr + (b * K + k) * 4
    tl.store(addresses, _of_source(i, address_0, address_1, address_2) + skipped * itemsize)
    tl.store(addresses + 1 + axis, stride, mask=real)


@kernel(specialize=("D", *(f"stride_{axis}_{i}" for axis in ("row", "token") for i in range(3))))
def _context_gather_kernel(  # type: ignore[no-untyped-def]
    source_0_ptr, source_1_ptr, source_2_ptr, out_ptr, plan_ptr, B, K, D,
    k_0, P_0, stride_row_0, stride_token_0, k_1, P_1, stride_row_1, stride_token_1,
    k_2, P_2, stride_row_2, stride_token_2,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copies a block of one sample's footprint tokens: ``source [B_k, N_k, D]`` to its rows of ``out``.

    ``out`` holds the ``B * P`` rows of every source, one source after another, contiguous.
    """
    blocks_d = tl.cdiv(D, BLOCK_D)
    i, pid = _source_of_program(tl.cdiv(P_0, BLOCK_T) * blocks_d * B, tl.cdiv(P_1, BLOCK_T) * blocks_d * B)
    k, P = _of_source(i, k_0, k_1, k_2), _of_source(i, P_0, P_1, P_2)
    first_j, first_d, b = _block_of_program(pid, P, BLOCK_T, D, BLOCK_D)
    j, d = first_j + tl.arange(0, BLOCK_T), first_d + tl.arange(0, BLOCK_D)
    footprint, _ = _row_of_plan(plan_ptr, K, b, k)
    p_h, p_w = tl.load(footprint + 4), tl.load(footprint + 5)
    f = tl.load(footprint) + j // (p_h * p_w)
    h = tl.load(footprint + 1) + j // p_w % p_h
    w = tl.load(footprint + 2) + j % p_w
    token = (f * tl.load(footprint + 7) + h) * tl.load(footprint + 8) + w
    mask = (j < P)[:, None] & (d < D)[None, :]
    source = _of_source(i, source_0_ptr, source_1_ptr, source_2_ptr)
    source += tl.load(footprint + 9).to(tl.int64) * _of_source(i, stride_row_0, stride_row_1, stride_row_2)
    source += token.to(tl.int64) * _of_source(i, stride_token_0, stride_token_1, stride_token_2)
    value = tl.load(source[:, None] + d[None, :], mask=mask, other=0.0)
    before = _of_source(i, 0, tl.cast(B, tl.int64) * P_0, tl.cast(B, tl.int64) * (P_0 + P_1))
    out = out_ptr + (before + b.to(tl.int64) * P + j) * D
    tl.store(out[:, None] + d[None, :], value, mask=mask)


@kernel(specialize=("D",))
def _context_scatter_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, out_0_ptr, out_1_ptr, out_2_ptr, plan_ptr, B, K, D,
    k_0, rows_0, N_0, P_0, k_1, rows_1, N_1, P_1, k_2, rows_2, N_2, P_2,
    HAS_INDEX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Transpose of the gather, ``grad -> out [rows, N, D]``, a block of one row's source tokens per program.

    Each token sums, in order, over the samples whose footprint contains it. All tensors are contiguous.
    """
    blocks_d = tl.cdiv(D, BLOCK_D)
    i, pid = _source_of_program(tl.cdiv(N_0, BLOCK_T) * blocks_d * rows_0, tl.cdiv(N_1, BLOCK_T) * blocks_d * rows_1)
    k, N, P = _of_source(i, k_0, k_1, k_2), _of_source(i, N_0, N_1, N_2), _of_source(i, P_0, P_1, P_2)
    first_t, first_d, row = _block_of_program(pid, N, BLOCK_T, D, BLOCK_D)
    t, d = first_t + tl.arange(0, BLOCK_T), first_d + tl.arange(0, BLOCK_D)
    before = _of_source(i, 0, tl.cast(B, tl.int64) * P_0, tl.cast(B, tl.int64) * (P_0 + P_1))
    footprint, _ = _row_of_plan(plan_ptr, K, 0, k)
    m_h, m_w = tl.load(footprint + 7), tl.load(footprint + 8)
    f, h, w = t // (m_h * m_w), t // m_w % m_h, t % m_w
    acc = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    first_sample = 0 if HAS_INDEX else row
    for n in range(B if HAS_INDEX else 1):
        b = first_sample + n
        footprint, _ = _row_of_plan(plan_ptr, K, b, k)
        # A sample that reads another row of the source has no footprint in this row.
        p_f = tl.where(tl.load(footprint + 9) == row, tl.load(footprint + 3), 0)
        p_h, p_w = tl.load(footprint + 4), tl.load(footprint + 5)
        j_f, j_h, j_w = f - tl.load(footprint), h - tl.load(footprint + 1), w - tl.load(footprint + 2)
        inside = (j_f >= 0) & (j_f < p_f) & (j_h >= 0) & (j_h < p_h) & (j_w >= 0) & (j_w < p_w) & (t < N)
        grad = grad_ptr + (before + tl.cast(b, tl.int64) * P + (j_f * p_h + j_h) * p_w + j_w) * D
        acc += tl.load(grad[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    out = _of_source(i, out_0_ptr, out_1_ptr, out_2_ptr)
    mask = (t < N)[:, None] & (d < D)[None, :]
    tl.store(
        out + ((row.to(tl.int64) * N + t) * D)[:, None] + d[None, :], acc.to(out_0_ptr.dtype.element_ty), mask=mask
    )


@jit
def _token_position(position, footprint, AXIS: tl.constexpr, i):  # type: ignore[no-untyped-def]
    """Positions of tokens ``i`` of one axis in the footprint; the clamp is the border padding.

    ``position`` and ``footprint`` are those of :func:`_row_of_plan`.
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
    plan_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
    b, K, share, D, n_f, n_h, n_w, first_line, first_w, first_d,
    HAS_BIAS: tl.constexpr, HAS_COORDINATES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean over sources of trilinear samples, plus coordinates and bias: fp32 ``[BLOCK_W, BLOCK_L, BLOCK_D]``.

    Works on lines of tokens along the width. For each width position that a line needs, source tokens are summed over
    the frame and height taps once; every token of the line then adds this sum with its hat weight. At relative scale
    1/2 eight tokens need at most six sums, which read 24 rows, while their corners are 64 rows. The loop over these
    sums must not be unrolled, or registers spill. ``share`` is ``1 / K``: a division takes a subroutine, and stack.
    """
    line = first_line + tl.arange(0, BLOCK_L)
    w = first_w + tl.arange(0, BLOCK_W)
    d = first_d + tl.arange(0, BLOCK_D)
    f, h = line // n_h, line % n_h
    mask = (f < n_f)[None, :, None] & (d < D)[None, None, :]
    acc = tl.zeros((BLOCK_W, BLOCK_L, BLOCK_D), dtype=tl.float32)
    for k in range(K):
        footprint, position = _row_of_plan(plan_ptr, K, b, k)
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
            column = tl.load(coordinate_ptr + axis * D + d, mask=d < D, other=0.0).to(tl.float32)
            acc += (c[:, None, None] if axis == 2 else c[None, :, None]) * column[None, None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, None, :]
    return acc


@kernel(specialize=("D",))
def _add_context_kernel(  # type: ignore[no-untyped-def]
    plan_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
    K, share, D, n_f, n_h, n_w,
    ONTO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COORDINATES: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes a block of one sample's context, coordinates and bias to ``out``; ``ONTO``: adds it to ``out``."""
    blocks_w = tl.cdiv(n_w, BLOCK_W)
    block, first_d, b = _block_of_program(tl.program_id(0), tl.cdiv(n_f * n_h, BLOCK_L) * blocks_w, 1, D, BLOCK_D)
    first_line, first_w = block // blocks_w * BLOCK_L, block % blocks_w * BLOCK_W
    acc = _context_tile(
        plan_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
        b, K, share, D, n_f, n_h, n_w, first_line, first_w, first_d,
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


@kernel(specialize=("D", "stride_x_b", "stride_x_n", "stride_weight"))
def _fuse_context_fwd_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, plan_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr,
    out_ptr,
    K, share, D, n_f, n_h, n_w, stride_x_b, stride_x_n, stride_weight,
    HAS_BIAS: tl.constexpr, HAS_COORDINATES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out = x @ weight.T`` plus context, coordinates and bias; one block of one sample per program.

    The accumulator starts with the context. Adding the context at the end would keep both in registers at once.
    """
    blocks_w = tl.cdiv(n_w, BLOCK_W)
    # Blocks of columns vary fastest: neighboring programs share tokens, so that their rows of x and of the sources are
    # still in the L2 cache.
    blocks = tl.cdiv(n_f * n_h, BLOCK_L) * blocks_w
    first_d, block, b = _block_of_program(tl.program_id(0), D, BLOCK_D, blocks, 1)
    first_line, first_w = block // blocks_w * BLOCK_L, block % blocks_w * BLOCK_W
    acc = _context_tile(
        plan_ptr, address_table_ptr, box_ptr, coordinate_ptr, bias_ptr, out_ptr,
        b, K, share, D, n_f, n_h, n_w, first_line, first_w, first_d,
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
        x_tile, weight_tile = as_operand(x_tile, PRECISION), as_operand(weight_tile, PRECISION)
        acc = tl.dot(x_tile, weight_tile, acc, input_precision=PRECISION)
    out = out_ptr + (b * lines * n_w + t) * D
    tl.store(out[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])


@kernel(specialize=("D",))
def _context_contract_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, out_ptr, plan_ptr, K, D, outer, per_sample, n,
    k_0, p_0, width_0, read_0, written_0, k_1, p_1, width_1, read_1, written_1, k_2, p_2, width_2, read_2, written_2,
    AXIS: tl.constexpr, MEAN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Transposed interpolation along one axis, ``grad [outer, n, width] -> out [outer, p, width]``, both contiguous.

    ``width`` is in rows of ``D`` elements, and so is where the source begins in ``grad`` (``read``) and in ``out``
    (``written``). A program works on a block of the ``outer * p`` rows of the result. Footprint token ``j`` sums over
    the tokens whose positions are less than one away, a range in closed form; a border token also over all tokens
    beyond it.
    """
    i, pid = _source_of_program(
        tl.cdiv(outer * p_0, BLOCK_R) * tl.cdiv(width_0 * D, BLOCK_D),
        tl.cdiv(outer * p_1, BLOCK_R) * tl.cdiv(width_1 * D, BLOCK_D),
    )
    k, p, width = (
        _of_source(i, k_0, k_1, k_2),
        _of_source(i, p_0, p_1, p_2),
        _of_source(i, width_0, width_1, width_2) * D,
    )
    blocks_d = tl.cdiv(width, BLOCK_D)
    r = pid // blocks_d * BLOCK_R + tl.arange(0, BLOCK_R)
    d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    real = r < outer * p
    sample, j = r // p // per_sample, r % p
    _, position = _row_of_plan(plan_ptr, K, sample, k)
    first = tl.load(position + AXIS, mask=real, other=0.0)
    step = tl.load(position + 3 + AXIS, mask=real, other=1.0)
    # One more token on either side, because of rounding; tokens outside the range get weight 0.
    low = tl.where(j == 0, 0, tl.minimum(tl.maximum(tl.ceil((j - 1 - first) / step) - 1.0, 0.0), n).to(tl.int32))
    high = tl.floor((j + 1 - first) / step) + 1.0
    high = tl.where(j == p - 1, n - 1, tl.minimum(tl.maximum(high, -1.0), n - 1).to(tl.int32))
    high = tl.where(real, high, -1)
    count = tl.max(high - low, axis=0) + 1
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    grad = grad_ptr + tl.cast(_of_source(i, read_0, read_1, read_2), tl.int64) * D
    grad += (r // p).to(tl.int64) * n * width
    for c in range(count):
        t = low + c
        u = tl.minimum(tl.maximum(first + t.to(tl.float32) * step, 0.0), (p - 1) * 1.0)
        weight = tl.maximum(1.0 - tl.abs(u - j.to(tl.float32)), 0.0)
        mask = (t <= high)[:, None] & (d < width)[None, :]
        value = tl.load((grad + t.to(tl.int64) * width)[:, None] + d[None, :], mask=mask, other=0.0)
        acc += weight[:, None] * value.to(tl.float32)
    if MEAN:
        acc = acc / (K * 1.0)
    out = out_ptr + tl.cast(_of_source(i, written_0, written_1, written_2), tl.int64) * D + r.to(tl.int64) * width
    tl.store(out[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=real[:, None] & (d < width)[None, :])


@kernel(specialize=("D",))
def _coordinate_sums_kernel(  # type: ignore[no-untyped-def]
    grad_ptr, box_ptr, out_ptr, N, D, n_f, n_h, n_w, chunk, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """``out [B, chunks, 4, D]`` fp32: sums of grad over a chunk of tokens, weighted by the coordinates, and by 1."""
    chunks = tl.cdiv(N, chunk)
    chunk_id, first_d, b = _block_of_program(tl.program_id(0), chunks, 1, D, BLOCK_D)
    d = first_d + tl.arange(0, BLOCK_D)
    box = box_ptr + b * 6
    o_f, o_h, o_w = tl.load(box), tl.load(box + 1), tl.load(box + 2)
    s_f, s_h, s_w = tl.load(box + 3), tl.load(box + 4), tl.load(box + 5)
    # Summed over the threads once, after the loop: that takes barriers.
    zero = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    by_f, by_h, by_w, total = zero, zero, zero, zero
    for begin in range(chunk_id * chunk, tl.minimum((chunk_id + 1) * chunk, N), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        mask = ((t < N) & (t < (chunk_id + 1) * chunk))[:, None] & (d < D)[None, :]
        grad = grad_ptr + (b.to(tl.int64) * N + t) * D
        value = tl.load(grad[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        c_f = o_f + s_f * (((t // (n_h * n_w)).to(tl.float32) + 0.5) / (n_f * 1.0))
        c_h = o_h + s_h * (((t // n_w % n_h).to(tl.float32) + 0.5) / (n_h * 1.0))
        c_w = o_w + s_w * (((t % n_w).to(tl.float32) + 0.5) / (n_w * 1.0))
        by_f += c_f[:, None] * value
        by_h += c_h[:, None] * value
        by_w += c_w[:, None] * value
        total += value
    out = out_ptr + (b.to(tl.int64) * chunks + chunk_id) * 4 * D + d
    tl.store(out, tl.sum(by_f, axis=0), mask=d < D)
    tl.store(out + D, tl.sum(by_h, axis=0), mask=d < D)
    tl.store(out + 2 * D, tl.sum(by_w, axis=0), mask=d < D)
    tl.store(out + 3 * D, tl.sum(total, axis=0), mask=d < D)


@kernel(specialize=("M", "N", "K", "stride_a_m", "stride_a_k", "stride_b_k", "stride_b_n", "stride_out_m"))
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
        a_tile, b_tile = as_operand(a_tile, PRECISION), as_operand(b_tile, PRECISION)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a += BLOCK_K * tl.cast(stride_a_k, tl.int64)
        b += BLOCK_K * tl.cast(stride_b_k, tl.int64)
    out = out_ptr + m.to(tl.int64)[:, None] * stride_out_m + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
