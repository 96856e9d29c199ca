"""Launches the kernels of the ops on rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm_kernels._triton import cdiv, launch_grid
from hpdm_kernels.rows import triton_kernels
from hpdm_kernels.rows.block_sizes import COLUMNS, chunk_rows, whole_rows


def norm_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y, out, mean, rstd``, where ``y`` is ``x`` without a branch; see :mod:`hpdm_kernels.rows.ops`."""
    batch, rows, width = x.shape
    x, shift, scale = _dense(x), _dense(shift), _dense(scale)
    out = x.new_empty(x.shape)
    mean, rstd = (x.new_empty(batch, rows, dtype=torch.float32) for _ in range(2))
    y = x if branch is None else x.new_empty(x.shape)
    # Missing tensors are never read; any other one stands for them.
    behind = x if branch is None else _dense(branch)
    factor = shift if gate is None else _dense(gate)
    tile = whole_rows(width)
    blocks = cdiv(rows, tile.rows)
    triton_kernels.modulated_norm_fwd_kernel[launch_grid(batch, blocks)](
        x, behind, factor, shift, scale, out, y, mean, rstd,
        *x.stride()[:2], *behind.stride()[:2], factor.stride(0), shift.stride(0), scale.stride(0),
        rows, width, blocks, eps,
        BRANCH=branch is not None, GATE=gate is not None, **tile.blocks, num_warps=tile.num_warps,
    )  # fmt: skip
    return y, out, mean, rstd


def norm_backward(
    grad_y: Tensor | None, grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor,
    branch: Tensor | None, gate: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients; see :func:`hpdm_kernels.rows.ops.modulated_norm_bwd`."""
    batch, rows, width = y.shape
    gated = branch is not None and gate is not None
    grad, y, scale = _dense(grad), _dense(y), _dense(scale)
    above = grad if grad_y is None else _dense(grad_y)
    behind, factor = (y, scale) if branch is None or gate is None else (_dense(branch), _dense(gate))
    dx = y.new_empty(y.shape)
    dbranch = behind.new_empty(y.shape) if gated else dx
    tile = whole_rows(width)
    chunk = chunk_rows(tile, rows, batch)
    chunks = cdiv(rows, chunk)
    sums = y.new_empty(batch, chunks, 2 + gated, width, dtype=torch.float32)
    triton_kernels.modulated_norm_bwd_kernel[launch_grid(batch, chunks)](
        grad, above, y, mean, rstd, scale, behind, factor, dx, dbranch, sums,
        *grad.stride()[:2], *above.stride()[:2], *y.stride()[:2], scale.stride(0),
        *behind.stride()[:2], factor.stride(0), rows, width, chunks, chunk,
        RESIDUAL=grad_y is not None, GATE=gated, **tile.blocks, num_warps=tile.num_warps,
    )  # fmt: skip
    dshift, dscale, *dgate = _summed(sums, dim=1).unbind(1)
    gradients = [dx, _own(dshift, shift.dtype), _own(dscale, scale.dtype)]
    return [*gradients, dbranch, _own(dgate[0], factor.dtype)] if gated else gradients


def residual_backward(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``branch [B, N, D]`` and ``gate [B, D]``, from ``grad [B, N, D]``."""
    batch, rows, width = grad.shape
    grad, branch, gate = _dense(grad), _dense(branch), _dense(gate)
    dbranch = branch.new_empty(branch.shape)
    blocks = cdiv(width, COLUMNS.columns)
    chunk = chunk_rows(COLUMNS, rows, batch * blocks)
    chunks = cdiv(rows, chunk)
    sums = grad.new_empty(batch, chunks, width, dtype=torch.float32)
    triton_kernels.gated_residual_bwd_kernel[launch_grid(batch, chunks, blocks)](
        grad, branch, gate, dbranch, sums, *grad.stride()[:2], *branch.stride()[:2], gate.stride(0),
        rows, width, chunks, chunk, **COLUMNS.blocks, num_warps=COLUMNS.num_warps,
    )  # fmt: skip
    return dbranch, _summed(sums, dim=1).to(gate.dtype)


def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)``, of ``[R, D]`` and ``[D]``."""
    rows, width = x.shape
    x, bias = _dense(x), bias.contiguous()
    out = x.new_empty(x.shape)
    grid = launch_grid(cdiv(rows, COLUMNS.rows), cdiv(width, COLUMNS.columns))
    triton_kernels.bias_gelu_fwd_kernel[grid](
        x, bias, out, x.stride(0), rows, width, **COLUMNS.blocks, num_warps=COLUMNS.num_warps
    )
    return out


def gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [R, D]`` and ``bias [D]``, from ``grad [R, D]``."""
    rows, width = x.shape
    grad, x, bias = _dense(grad), _dense(x), bias.contiguous()
    dx = x.new_empty(x.shape)
    blocks = cdiv(width, COLUMNS.columns)
    chunk = chunk_rows(COLUMNS, rows, blocks)
    chunks = cdiv(rows, chunk)
    sums = x.new_empty(chunks, width, dtype=torch.float32)
    triton_kernels.bias_gelu_bwd_kernel[launch_grid(chunks, blocks)](
        grad, x, bias, dx, sums, grad.stride(0), x.stride(0), rows, width, chunk,
        **COLUMNS.blocks, num_warps=COLUMNS.num_warps,
    )  # fmt: skip
    return dx, _summed(sums, dim=0).to(bias.dtype)


def _summed(sums: Tensor, dim: int) -> Tensor:
    """The programs' sums added up; PyTorch's reduction has a fixed order."""
    return sums.squeeze(dim) if sums.shape[dim] == 1 else sums.sum(dim)


def _dense(t: Tensor) -> Tensor:
    """``t`` with an innermost stride of 1, as the kernels expect; a copy where it has another."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _own(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` of ``dtype`` in memory of its own: results of an op share none."""
    return t.to(dtype, copy=True)
