"""Kernels of the ops on rows, launched by :mod:`hpdm_kernels.rows.triton_backend`.

A program keeps whole rows of a norm in registers, ``ROWS`` at once, and reads each once. Backward it goes through a
chunk of the rows of one sample and keeps a sum for each place of its tile; only at the end are these added over the
tile's rows and written, ``[B, chunks, sums, D]``, and PyTorch adds the chunks. GELU needs no whole rows: its programs
take columns.

All arithmetic is fp32. Offsets of rows are int64. Masked lanes are zero, so that they add nothing.
"""

# Kernels' arguments have Triton's types, not Python's.
# mypy: allow-untyped-defs

from __future__ import annotations

from hpdm_kernels._triton import jit, kernel, tl


@jit
def _vector(pointer, b, stride, column, inside):
    """A vector of sample ``b`` in fp32."""
    return tl.load(pointer + b.to(tl.int64) * stride + column, mask=inside, other=0.0).to(tl.float32)


@jit
def _rows(pointer, b, row, column, stride_b, stride_n, inside):
    """Rows of sample ``b`` in fp32, ``[ROWS, BLOCK_D]``."""
    at = pointer + b.to(tl.int64) * stride_b + row.to(tl.int64)[:, None] * stride_n + column[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@kernel(
    specialize=(
        "stride_x_b", "stride_x_n", "stride_branch_b", "stride_branch_n", "stride_gate_b", "stride_shift_b",
        "stride_scale_b", "width",
    )
)  # fmt: skip
def modulated_norm_fwd_kernel(
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr,
    stride_x_b, stride_x_n, stride_branch_b, stride_branch_n, stride_gate_b, stride_shift_b, stride_scale_b,
    rows, width, blocks, eps,
    BRANCH: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of one sample: residual, norm, modulation. ``out`` and ``y`` are contiguous."""
    program = tl.program_id(0)
    b = program // blocks
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    real = row < rows
    wide = column < width
    inside = real[:, None] & wide[None, :]
    y = _rows(x_ptr, b, row, column, stride_x_b, stride_x_n, inside)
    at = (b.to(tl.int64) * rows + row)[:, None] * width + column[None, :]
    if BRANCH:
        branch = _rows(branch_ptr, b, row, column, stride_branch_b, stride_branch_n, inside)
        if GATE:
            branch = branch * _vector(gate_ptr, b, stride_gate_b, column, wide)[None, :]
        # The norm is that of the stored numbers, whatever their dtype.
        stored = (y + branch).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + at, stored, mask=inside)
        y = stored.to(tl.float32)
    mean = tl.sum(y, axis=1) / width
    centered = tl.where(inside, y - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=1) / width + eps)
    gain = 1.0 + _vector(scale_ptr, b, stride_scale_b, column, wide)
    out = centered * rstd[:, None] * gain[None, :] + _vector(shift_ptr, b, stride_shift_b, column, wide)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + b.to(tl.int64) * rows + row, mean, mask=real)
    tl.store(rstd_ptr + b.to(tl.int64) * rows + row, rstd, mask=real)


@kernel(
    specialize=(
        "stride_grad_b", "stride_grad_n", "stride_grad_y_b", "stride_grad_y_n", "stride_y_b", "stride_y_n",
        "stride_scale_b", "stride_branch_b", "stride_branch_n", "stride_gate_b", "width",
    )
)  # fmt: skip
def modulated_norm_bwd_kernel(
    grad_ptr, grad_y_ptr, y_ptr, mean_ptr, rstd_ptr, scale_ptr, branch_ptr, gate_ptr, dx_ptr, dbranch_ptr, sums_ptr,
    stride_grad_b, stride_grad_n, stride_grad_y_b, stride_grad_y_n, stride_y_b, stride_y_n, stride_scale_b,
    stride_branch_b, stride_branch_n, stride_gate_b, rows, width, chunks, chunk,
    RESIDUAL: tl.constexpr, GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``chunk`` rows of one sample: gradients of the rows, and sums for those of shift, scale and gate."""
    program = tl.program_id(0)
    b = program // chunks
    first = program % chunks * chunk
    column = tl.arange(0, BLOCK_D)
    wide = column < width
    gain = 1.0 + _vector(scale_ptr, b, stride_scale_b, column, wide)
    if GATE:
        gate = _vector(gate_ptr, b, stride_gate_b, column, wide)
    sum_shift = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sum_scale = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sum_gate = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(first, tl.minimum(first + chunk, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < rows
        inside = real[:, None] & wide[None, :]
        grad = _rows(grad_ptr, b, row, column, stride_grad_b, stride_grad_n, inside)
        y = _rows(y_ptr, b, row, column, stride_y_b, stride_y_n, inside)
        mean = tl.load(mean_ptr + b.to(tl.int64) * rows + row, mask=real, other=0.0)
        rstd = tl.load(rstd_ptr + b.to(tl.int64) * rows + row, mask=real, other=0.0)
        normal = tl.where(inside, (y - mean[:, None]) * rstd[:, None], 0.0)
        sum_shift += grad
        sum_scale += grad * normal
        inner = grad * gain[None, :]
        along = tl.sum(inner * normal, axis=1) / width
        dx = (inner - (tl.sum(inner, axis=1) / width)[:, None] - normal * along[:, None]) * rstd[:, None]
        if RESIDUAL:
            dx += _rows(grad_y_ptr, b, row, column, stride_grad_y_b, stride_grad_y_n, inside)
        at = (b.to(tl.int64) * rows + row)[:, None] * width + column[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if GATE:
            branch = _rows(branch_ptr, b, row, column, stride_branch_b, stride_branch_n, inside)
            sum_gate += tl.where(inside, dx * branch, 0.0)
            tl.store(dbranch_ptr + at, (dx * gate[None, :]).to(dbranch_ptr.dtype.element_ty), mask=inside)
    to = sums_ptr + program.to(tl.int64) * (2 + GATE) * width + column
    tl.store(to, tl.sum(sum_shift, axis=0), mask=wide)
    tl.store(to + width, tl.sum(sum_scale, axis=0), mask=wide)
    if GATE:
        tl.store(to + 2 * width, tl.sum(sum_gate, axis=0), mask=wide)


@kernel(specialize=("stride_grad_b", "stride_grad_n", "stride_branch_b", "stride_branch_n", "stride_gate_b", "width"))
def gated_residual_bwd_kernel(
    grad_ptr, branch_ptr, gate_ptr, dbranch_ptr, sums_ptr,
    stride_grad_b, stride_grad_n, stride_branch_b, stride_branch_n, stride_gate_b, rows, width, chunks, chunk,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``chunk`` rows and ``BLOCK_D`` columns of one sample: gradients of the branch, and a sum for that of the gate."""
    program = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK_D)
    column = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    b = program // blocks // chunks
    part = program // blocks % chunks
    wide = column < width
    gate = _vector(gate_ptr, b, stride_gate_b, column, wide)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & wide[None, :]
        grad = _rows(grad_ptr, b, row, column, stride_grad_b, stride_grad_n, inside)
        total += grad * _rows(branch_ptr, b, row, column, stride_branch_b, stride_branch_n, inside)
        at = (b.to(tl.int64) * rows + row)[:, None] * width + column[None, :]
        tl.store(dbranch_ptr + at, (grad * gate[None, :]).to(dbranch_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + (b.to(tl.int64) * chunks + part) * width + column, tl.sum(total, axis=0), mask=wide)


@jit
def _logistic(x):
    """``(1 + tanh(u)) / 2``, the logistic function of ``2 u``, with ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""
    return 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@kernel(specialize=("stride_x_n", "width"))
def bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, out_ptr, stride_x_n, rows, width, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """``ROWS`` rows and ``BLOCK_D`` columns; ``out`` is contiguous."""
    program = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK_D)
    column = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wide = column < width
    inside = (row < rows)[:, None] & wide[None, :]
    bias = tl.load(bias_ptr + column, mask=wide, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * stride_x_n + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x += bias[None, :]
    out = x * _logistic(x)
    tl.store(out_ptr + row[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(specialize=("stride_grad_n", "stride_x_n", "width"))
def bias_gelu_bwd_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, sums_ptr, stride_grad_n, stride_x_n, rows, width, chunk,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``chunk`` rows and ``BLOCK_D`` columns: gradients of ``x``, and a sum for that of the bias."""
    program = tl.program_id(0)
    blocks = tl.cdiv(width, BLOCK_D)
    column = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    part = (program // blocks).to(tl.int64)
    wide = column < width
    bias = tl.load(bias_ptr + column, mask=wide, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & wide[None, :]
        grad = tl.load(grad_ptr + row[:, None] * stride_grad_n + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * stride_x_n + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x += bias[None, :]
        s = _logistic(x)
        # The last factor is the derivative of 2 u.
        dx = grad * (s + x * s * (1.0 - s) * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
        total += tl.where(inside, dx, 0.0)
        tl.store(dx_ptr + row[:, None] * width + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + part * width + column, tl.sum(total, axis=0), mask=wide)
