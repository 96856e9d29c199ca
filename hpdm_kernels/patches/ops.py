"""The registered ops behind :func:`hpdm_kernels.sample_patches`: schemas, shapes for tracing, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._backend import autocast_off, custom_op
from hpdm_kernels.patches import torch_backend, triton_backend


@custom_op("sample_patches_fwd")
def sample_patches_fwd(video: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    """Patches ``[B, C, *size]`` of ``video [B, C, F, H, W]``; fp32 for uint8 videos."""
    forward = triton_backend.forward if backend == "triton" else torch_backend.forward
    with autocast_off(video):
        return forward(video, box, size)


@sample_patches_fwd.register_fake
def _(video: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    dtype = torch.float32 if video.dtype is torch.uint8 else video.dtype
    return video.new_empty(*video.shape[:2], *size, dtype=dtype)


@custom_op("sample_patches_bwd")
def sample_patches_bwd(grad: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    """Gradient ``[B, C, *size]`` of the video, from that of the patches, ``[B, C, f, h, w]``."""
    backward = triton_backend.backward if backend == "triton" else torch_backend.backward
    with autocast_off(grad):
        return backward(grad, box, size)


@sample_patches_bwd.register_fake
def _(grad: Tensor, box: Tensor, size: Sequence[int], backend: str) -> Tensor:
    return grad.new_empty(*grad.shape[:2], *size)


def _setup_sample_patches(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, box, _, ctx.backend = inputs
    ctx.size = source.shape[2:]
    ctx.save_for_backward(box)


def _backward_sample_patches(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
    if not ctx.needs_input_grad[0]:
        return None, None, None, None
    (box,) = ctx.saved_tensors
    return sample_patches_bwd(grad, box, ctx.size, ctx.backend), None, None, None


def _backward_sample_patches_bwd(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (box,) = ctx.saved_tensors
    return sample_patches_fwd(grad, box, ctx.size, ctx.backend), None, None, None


sample_patches_fwd.register_autograd(_backward_sample_patches, setup_context=_setup_sample_patches)
# The op is linear in the video, so the backward of its backward is the op itself.
sample_patches_bwd.register_autograd(_backward_sample_patches_bwd, setup_context=_setup_sample_patches)
