"""The registered ops behind :mod:`hpdm_kernels.temporal.api`: schemas, shapes for tracing, gradients, FLOPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hpdm_kernels._backend import autocast_off, custom_op
from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.temporal import torch_backend, triton_backend


def _of(backend: str) -> Any:
    return triton_backend if backend == "triton" else torch_backend


@custom_op("temporal_attention_fwd")
def temporal_attention_fwd(qkv: Tensor, rel_k: Tensor, rel_v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """``[B, T, N, h d]``, of ``qkv [B, T, N, 3 h d]`` and tables ``[2 R + 1, d]``; and the weights for the backward.

    These are ``[B, h, T, T, N]`` in fp32, or in fp64 for fp64; at ``[..., s, t, n]`` what the query at t gives to s.
    The kernels return none: computing them again costs them nothing.
    """
    with torch.cuda.device_of(qkv), autocast_off(qkv):
        return _of(backend).forward(qkv, rel_k, rel_v)


@temporal_attention_fwd.register_fake
def _(qkv: Tensor, rel_k: Tensor, rel_v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, frames, positions, channels = qkv.shape
    shape = (0,) if backend == "triton" else (batch, channels // (3 * rel_k.shape[1]), frames, frames, positions)
    weights = qkv.new_empty(shape, dtype=coordinate_dtype(qkv.dtype))
    return qkv.new_empty(batch, frames, positions, channels // 3), weights


@custom_op("temporal_attention_bwd")
def temporal_attention_bwd(
    grad: Tensor, qkv: Tensor, rel_k: Tensor, rel_v: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``qkv`` and the two tables, from ``grad [B, T, N, h d]``, that of the result."""
    with torch.cuda.device_of(qkv), autocast_off(qkv):
        return _of(backend).backward(grad, qkv, rel_k, rel_v, weights)


@temporal_attention_bwd.register_fake
def _(
    grad: Tensor, qkv: Tensor, rel_k: Tensor, rel_v: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), rel_k.new_empty(rel_k.shape), rel_v.new_empty(rel_v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*temporal_attention_bwd(grad, *ctx.saved_tensors, ctx.backend), None)


temporal_attention_fwd.register_autograd(_backward, setup_context=_setup)


def _product(qkv_shape: Any) -> int:
    """FLOPs of one product of all queries with all keys, which is also one with embeddings."""
    batch, frames, positions, channels = qkv_shape
    return 2 * batch * positions * frames * frames * channels // 3


@register_flop_formula(torch.ops.hpdm.temporal_attention_fwd)
def _forward_flops(qkv_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Keys and values, each with its embeddings."""
    return 4 * _product(qkv_shape)


@register_flop_formula(torch.ops.hpdm.temporal_attention_bwd)
def _backward_flops(grad_shape: Any, qkv_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The same for scores, which kernels recompute, for gradients of weights, of queries, and of all that they meet."""
    return 10 * _product(qkv_shape)
