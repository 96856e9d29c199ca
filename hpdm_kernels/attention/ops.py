"""The registered ops behind :mod:`hpdm_kernels.attention.api`: schemas, shapes for tracing, gradients, FLOPs.

They have many parameters because an op's schema cannot group them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hpdm_kernels import _backend
from hpdm_kernels.attention import packed as packed_attention
from hpdm_kernels.attention import read, torch_backend, triton_backend
from hpdm_kernels.attention.layout import empty_heads, unpack
from hpdm_kernels.boxes import coordinate_dtype

# ---- cross-attention: kernels only, since the torch backend is PyTorch's own attention ----


@torch.library.custom_op("hpdm::cross_attention_fwd", mutates_args=())
def cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out [B, h, M, d]`` and the base-2 log-sum-exp of the scaled scores, fp32 ``[B, h, M]``.

    ``q`` is ``[B, h, M, d]``, ``k`` and ``v`` are ``[B, h, N, d]``, ``key_mask`` is ``[B, N]`` bool.
    """
    with torch.cuda.device_of(q):
        return triton_backend.forward(q, k, v, scale, precision, key_mask)


@cross_attention_fwd.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hpdm::cross_attention_bwd", mutates_args=())
def cross_attention_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``dq [B, h, M, d]``, ``dk`` and ``dv`` ``[B, h, N, d]``, from ``grad``, that of ``out``."""
    with torch.cuda.device_of(q):
        return triton_backend.backward(grad, q, k, v, out, lse, scale, precision, key_mask)


@cross_attention_bwd.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(k)


def _setup_cross_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.precision, key_mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, key_mask)


def _backward_cross_attention(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, key_mask = ctx.saved_tensors
    return (*cross_attention_bwd(grad, *tensors, ctx.scale, ctx.precision, key_mask), None, None, None)


cross_attention_fwd.register_autograd(_backward_cross_attention, setup_context=_setup_cross_attention)


# Counted as PyTorch counts its fused attention: two products forward, five backward, one of which recomputes scores.
@register_flop_formula(torch.ops.hpdm.cross_attention_fwd)
def _cross_attention_fwd_flops(q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = q_shape
    return 2 * 2 * batch * heads * queries * k_shape[2] * width


@register_flop_formula(torch.ops.hpdm.cross_attention_bwd)
def _cross_attention_bwd_flops(grad_shape: Any, q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = q_shape
    return 5 * 2 * batch * heads * queries * k_shape[2] * width


# ---- the same of parts of one tensor, whose gradient is one tensor, too ----


@torch.library.custom_op("hpdm::packed_attention_fwd", mutates_args=())
def packed_attention_fwd(
    q: Tensor | None, packed: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`hpdm_kernels.attention.packed.forward`."""
    with torch.cuda.device_of(packed):
        return packed_attention.forward(q, packed, scale, precision, key_mask)


@packed_attention_fwd.register_fake
def _(q: Tensor | None, packed: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    queries = unpack(q, packed)[0]
    return empty_heads(queries), packed.new_empty(queries.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hpdm::packed_attention_bwd", mutates_args=())
def packed_attention_bwd(
    grad: Tensor,
    q: Tensor | None,
    packed: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> list[Tensor]:
    """See :func:`hpdm_kernels.attention.packed.backward`."""
    with torch.cuda.device_of(packed):
        return packed_attention.backward(grad, q, packed, out, lse, scale, precision, key_mask)


@packed_attention_bwd.register_fake
def _(grad: Tensor, q: Tensor | None, packed: Tensor, *_: Any) -> list[Tensor]:
    dpacked = packed.new_empty(packed.shape)
    return [dpacked] if q is None else [empty_heads(q), dpacked]


def _setup_packed_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, packed, ctx.scale, ctx.precision, key_mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, packed, out, lse, key_mask)


def _backward_packed_attention(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, key_mask = ctx.saved_tensors
    *dq, dpacked = packed_attention_bwd(grad, *tensors, ctx.scale, ctx.precision, key_mask)
    return (dq[0] if dq else None, dpacked, None, None, None)


packed_attention_fwd.register_autograd(_backward_packed_attention, setup_context=_setup_packed_attention)


def _packed_product(q_shape: Any, packed_shape: Any) -> int:
    """FLOPs of one product of queries with keys."""
    batch, keys, _, heads, width = packed_shape
    return 2 * batch * heads * (keys if q_shape is None else q_shape[2]) * keys * width


@register_flop_formula(torch.ops.hpdm.packed_attention_fwd)
def _packed_attention_fwd_flops(q_shape: Any, packed_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _packed_product(q_shape, packed_shape)


@register_flop_formula(torch.ops.hpdm.packed_attention_bwd)
def _packed_attention_bwd_flops(grad_shape: Any, q_shape: Any, packed_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 5 * _packed_product(q_shape, packed_shape)


# ---- the read of tokens with its projection ----


@_backend.custom_op("read_tokens_fwd")
def read_tokens_fwd(
    q: Tensor,
    tokens: Sequence[Tensor],
    weight: Tensor,
    key_mask: Tensor | None,
    scale: float,
    piece_rows: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`hpdm_kernels.attention.read.forward`."""
    with torch.cuda.device_of(q), _backend.autocast_off(q):
        return read.forward(q, tokens, weight, key_mask, scale, piece_rows, precision, backend)


@read_tokens_fwd.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty(q.shape[:3], dtype=coordinate_dtype(q.dtype))


@_backend.custom_op("read_tokens_bwd")
def read_tokens_bwd(
    grad: Tensor,
    q: Tensor,
    tokens: Sequence[Tensor],
    weight: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    scale: float,
    piece_rows: int,
    precision: str,
    backend: str,
) -> list[Tensor]:
    """See :func:`hpdm_kernels.attention.read.backward`."""
    with torch.cuda.device_of(q), _backend.autocast_off(q):
        return read.backward(grad, q, tokens, weight, out, lse, key_mask, scale, piece_rows, precision, backend)


@read_tokens_bwd.register_fake
def _(grad: Tensor, q: Tensor, tokens: Sequence[Tensor], weight: Tensor, *_: Any) -> list[Tensor]:
    return [empty_heads(q), weight.new_empty(weight.shape), *(t.new_empty(t.shape) for t in tokens)]


def _setup_read_tokens(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, tokens, weight, key_mask, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, weight, out, lse, key_mask, *tokens)


def _backward_read_tokens(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, weight, out, lse, key_mask, *tokens = ctx.saved_tensors
    dq, dweight, *dtokens = read_tokens_bwd(grad, q, tokens, weight, out, lse, key_mask, *ctx.options)
    return dq, dtokens, dweight, None, None, None, None, None


read_tokens_fwd.register_autograd(_backward_read_tokens, setup_context=_setup_read_tokens)


def _projection_and_product(q_shape: Any, token_shapes: Any, weight_shape: Any) -> tuple[int, int]:
    """FLOPs of the projection, and of one product of queries with keys."""
    batch, heads, queries, width = q_shape
    keys = sum(shape[1] for shape in token_shapes)
    return 2 * batch * keys * weight_shape[0] * weight_shape[1], 2 * batch * heads * queries * keys * width


# The projection once forward and three times backward (recomputed, and two gradients); the attention as above.
@register_flop_formula(torch.ops.hpdm.read_tokens_fwd)
def _read_tokens_fwd_flops(q_shape: Any, token_shapes: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    projection, product = _projection_and_product(q_shape, token_shapes, weight_shape)
    return projection + 2 * product


@register_flop_formula(torch.ops.hpdm.read_tokens_bwd)
def _read_tokens_bwd_flops(
    grad_shape: Any, q_shape: Any, token_shapes: Any, weight_shape: Any, *args: Any, **kwargs: Any
) -> int:
    projection, product = _projection_and_product(q_shape, token_shapes, weight_shape)
    return 3 * projection + 5 * product


_backend.PORTABLE[torch.ops.hpdm.cross_attention_fwd] = torch_backend.forward
_backend.PORTABLE[torch.ops.hpdm.cross_attention_bwd] = torch_backend.backward
_backend.IMPLEMENTATIONS[torch.ops.hpdm.cross_attention_fwd] = triton_backend.forward
_backend.IMPLEMENTATIONS[torch.ops.hpdm.cross_attention_bwd] = triton_backend.backward
_backend.PORTABLE[torch.ops.hpdm.packed_attention_fwd] = packed_attention.portable_forward
_backend.PORTABLE[torch.ops.hpdm.packed_attention_bwd] = packed_attention.portable_backward
_backend.IMPLEMENTATIONS[torch.ops.hpdm.packed_attention_fwd] = packed_attention.forward
_backend.IMPLEMENTATIONS[torch.ops.hpdm.packed_attention_bwd] = packed_attention.backward
