"""Launches the kernels of temporal attention."""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm_kernels._layout import dense_rows
from hpdm_kernels._triton import cdiv, launch_grid
from hpdm_kernels.temporal import triton_kernels
from hpdm_kernels.temporal.block_sizes import chunk_positions, tile
from hpdm_kernels.temporal.distances import fold

LOG2E = 1.4426950408889634


def forward(qkv: Tensor, rel_k: Tensor, rel_v: Tensor) -> tuple[Tensor, Tensor]:
    """The result and no weights; see :func:`hpdm_kernels.temporal.ops.temporal_attention_fwd`."""
    qkv, rel_k, rel_v = dense_rows(qkv), rel_k.contiguous(), rel_v.contiguous()
    batch, frames, positions, channels = qkv.shape
    rows, width = rel_k.shape
    heads = channels // (3 * width)
    out = qkv.new_empty(batch, frames, positions, heads * width)
    sizes = tile(frames, width, backward=False)
    blocks = cdiv(positions, sizes.positions)
    triton_kernels.temporal_attention_fwd_kernel[launch_grid(batch, blocks, heads)](
        qkv, rel_k, rel_v, out, *qkv.stride()[:3], frames, positions, heads, rows // 2, blocks,
        width**-0.5 * LOG2E, WIDTH=width, **sizes.blocks, num_warps=sizes.num_warps,
    )  # fmt: skip
    return out, out.new_empty(0, dtype=torch.float32)


def backward(grad: Tensor, qkv: Tensor, rel_k: Tensor, rel_v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; see :func:`hpdm_kernels.temporal.ops.temporal_attention_bwd`. ``weights`` are not used."""
    dqkv = qkv.new_empty(qkv.shape)
    dtypes = rel_k.dtype, rel_v.dtype
    grad, qkv, rel_k, rel_v = dense_rows(grad), dense_rows(qkv), rel_k.contiguous(), rel_v.contiguous()
    batch, frames, positions, channels = qkv.shape
    rows, width = rel_k.shape
    heads = channels // (3 * width)
    sizes = tile(frames, width, backward=True)
    chunk = chunk_positions(sizes.positions, positions, batch * heads)
    chunks = cdiv(positions, chunk)
    sums = qkv.new_empty(batch * chunks * heads, 2, 2 * frames - 1, width, dtype=torch.float32)
    triton_kernels.temporal_attention_bwd_kernel[launch_grid(batch, chunks, heads)](
        grad, qkv, rel_k, rel_v, dqkv, sums, *grad.stride()[:3], *qkv.stride()[:3],
        frames, positions, heads, rows // 2, chunks, chunk, width**-0.5, width**-0.5 * LOG2E,
        WIDTH=width, **sizes.blocks, num_warps=sizes.num_warps,
    )  # fmt: skip
    # PyTorch's reduction has a fixed order.
    of_keys, of_values = sums.sum(0)
    return dqkv, fold(of_keys, rows).to(dtypes[0]), fold(of_values, rows).to(dtypes[1])
