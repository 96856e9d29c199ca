"""Launches the kernels of group normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm_kernels._layout import dense_rows
from hpdm_kernels._triton import cdiv, launch_grid
from hpdm_kernels.groupnorm import triton_kernels as kernels
from hpdm_kernels.groupnorm.block_sizes import CELLS, GROUP_CHANNELS, chunk_rows, tile_of
from hpdm_kernels.groupnorm.form import Form


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, form: Form, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``out, mean, rstd``; see :func:`hpdm_kernels.groupnorm.ops.group_norm_act_fwd`."""
    batch, frames, height, width, channels = x.shape
    _, out_frames, out_height, out_width, _ = padded = form.padded(x.shape)
    x, weight, bias = dense_rows(x), weight.contiguous(), bias.contiguous()
    out = x.new_empty(padded)
    mean, rstd = (x.new_empty(form.statistics(x.shape), dtype=torch.float32) for _ in range(2))
    tile, rows, out_rows = tile_of(channels), height * width, out_height * out_width
    blocks, group_width = cdiv(channels, tile.channels), channels // form.groups
    chunk = chunk_rows(tile, rows, batch * frames * blocks)
    chunks = cdiv(rows, chunk)
    moments = x.new_empty(batch * frames, chunks, 2, channels, dtype=torch.float32)
    kernels.group_moments_kernel[launch_grid(batch * frames, chunks, blocks)](
        x, moments, *x.stride()[:4], frames, width, rows, channels, chunks, chunk,
        **tile.blocks, num_warps=tile.num_warps,
    )  # fmt: skip
    merged = frames if form.per_clip else 1
    kernels.group_statistics_kernel[launch_grid(mean.numel())](
        moments, mean, rstd, form.groups, group_width, merged, chunks, chunk, rows, eps, BLOCK=CELLS
    )
    # Missing tensors are never read; any other one stands for them.
    vectors, strides = _modulation(weight, scale, shift, frames)
    out_chunk = chunk_rows(tile, out_rows, batch * out_frames * blocks)
    out_chunks = cdiv(out_rows, out_chunk)
    kernels.group_norm_act_fwd_kernel[launch_grid(batch * out_frames, out_chunks, blocks)](
        x, weight, bias, *vectors, mean, rstd, out, *x.stride()[:4], *strides,
        frames, height, width, channels, group_width, mean.shape[1], *form.front,
        out_frames, out_width, out_rows, out_chunks, out_chunk,
        MODULATED=scale is not None, SILU=form.silu, **tile.blocks, num_warps=tile.num_warps,
    )  # fmt: skip
    return out, mean, rstd


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, form: Form,
) -> list[Tensor]:  # fmt: skip
    """Gradients; see :func:`hpdm_kernels.groupnorm.ops.group_norm_act_bwd`."""
    batch, frames, height, width, channels = x.shape
    grad, x, weight, bias = dense_rows(grad), dense_rows(x), weight.contiguous(), bias.contiguous()
    dx = x.new_empty(x.shape)
    tile, rows = tile_of(channels, form.is_padded and x.dtype is torch.float32), height * width
    statistics = mean.shape[1]
    blocks, group_width = cdiv(channels, tile.channels), channels // form.groups
    chunk = chunk_rows(tile, rows, batch * frames * blocks)
    chunks = cdiv(rows, chunk)
    vectors, strides = _modulation(weight, scale, shift, frames)
    where = (
        *grad.stride()[:4], *x.stride()[:4], *strides, frames, height, width, channels, group_width, statistics,
        *form.front, *grad.shape[1:4], chunks, chunk,
    )  # fmt: skip
    grid = launch_grid(batch * frames, chunks, blocks)
    flags = {"MODULATED": scale is not None, "SILU": form.silu, "PAD": form.is_padded}
    sums = x.new_empty(batch * frames, chunks, 2, channels, dtype=torch.float32)
    kernels.group_norm_act_sums_kernel[grid](
        grad, x, weight, bias, *vectors, mean, rstd, sums, *where, **flags, **tile.blocks, num_warps=tile.num_warps
    )
    sums = _summed(sums, dim=1)  # [B T, 2, C]
    means = x.new_empty(*mean.shape, 2, dtype=torch.float32)
    dvectors = x.new_empty(batch, 2, channels, dtype=torch.float32)
    modulation = [vector.new_empty(vector.shape) for vector in (scale, shift) if vector is not None]
    kernels.group_gradients_kernel[launch_grid(batch, form.groups)](
        sums, weight, bias, vectors[0], means, dvectors, *(modulation or (dvectors, dvectors)), *strides[:2],
        form.groups, group_width, frames, statistics, 1 if scale is None else scale.shape[1], rows,
        MODULATED=scale is not None, BLOCK_C=GROUP_CHANNELS,
    )  # fmt: skip
    kernels.group_norm_act_bwd_kernel[grid](
        grad, x, weight, bias, *vectors, mean, rstd, means, dx, *where,
        **flags, **tile.blocks, num_warps=tile.num_warps,
    )  # fmt: skip
    dweight, dbias = _summed(dvectors, dim=0)
    return [dx, dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True), *modulation]


def _modulation(
    weight: Tensor, scale: Tensor | None, shift: Tensor | None, frames: int
) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int]]:
    """Scale and shift, and their strides from sample to sample and from frame to frame."""
    if scale is None or shift is None:
        return (weight, weight), (0, 0, 0, 0)
    scale, shift = dense_rows(scale), dense_rows(shift)
    strides = [stride for t in (scale, shift) for stride in t.expand(-1, frames, -1).stride()[:2]]
    return (scale, shift), (strides[0], strides[1], strides[2], strides[3])


def _summed(sums: Tensor, dim: int) -> Tensor:
    """The programs' sums added up; PyTorch's reduction has a fixed order."""
    return sums.squeeze(dim) if sums.shape[dim] == 1 else sums.sum(dim)
