"""Launches the kernels of patch extraction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels._triton import INTERPRETED, cdiv, launch_grid, next_power_of_2
from hpdm_kernels.patches import triton_kernels

# Rows and columns of one frame per program. The interpreter's cost is per program and operation, not per pixel, so it
# gets large blocks.
GPU_BLOCK, INTERPRETED_BLOCK = (8, 64), (256, 256)


def _launch(kernel: Any, source: Tensor, box: Tensor, out: Tensor, video: Sequence[int], size: Sequence[int]) -> Tensor:
    """Launches ``kernel``, which reads ``source`` and fills ``out``, both ``[B, C, frames, height, width]``.

    ``video`` and ``size`` are (frames, height, width) of the video and of the patch.
    """
    b, c, frames, height, width = out.shape
    block_h, block_w = INTERPRETED_BLOCK if INTERPRETED else GPU_BLOCK
    block_h, block_w = min(block_h, next_power_of_2(height)), min(block_w, next_power_of_2(width))
    n_blocks_h, n_blocks_w = cdiv(height, block_h), cdiv(width, block_w)
    with torch.cuda.device_of(source):
        kernel[launch_grid(b, c, frames, n_blocks_h, n_blocks_w)](
            source, box.contiguous(), out, *source.stride(), c, *video, *size, n_blocks_h, n_blocks_w,
            SNAP=reference.EDGE_SNAP, BLOCK_H=block_h, BLOCK_W=block_w,
        )  # fmt: skip
    return out


def forward(video: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Patches ``[B, C, *size]`` of ``video [B, C, F, H, W]``; fp32 for uint8 videos."""
    dtype = torch.float32 if video.dtype is torch.uint8 else video.dtype
    out = video.new_empty(*video.shape[:2], *size, dtype=dtype)
    return _launch(triton_kernels.sample_patches_fwd_kernel, video, box, out, video.shape[2:], size)


def backward(grad: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Gradient ``[B, C, *size]`` of the video from that of the patches, ``[B, C, f, h, w]``."""
    dvideo = grad.new_empty(*grad.shape[:2], *size)
    return _launch(triton_kernels.sample_patches_bwd_kernel, grad, box, dvideo, size, grad.shape[2:])
