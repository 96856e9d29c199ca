"""RIN's attention: latents read tokens, tokens read latents (HPDM Fig. 11).

``out = softmax(q @ k.T * scale) @ v`` for ``q, out [B,h,M,d]`` and ``k, v [B,h,N,d]``. The forward kernel reads q and
writes out once, and reads k and v once per block of queries (from L2: a head's blocks run side by side); a plain
softmax also writes and reads ``[B,h,M,N]`` several times. Saved beside inputs and output: the log-sum-exp, fp32
``[B,h,M]``. ``cross_attention_kernels`` has the kernels, ``cross_attention_triton`` launches them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hpdm_kernels import _backend, reference
from hpdm_kernels._checks import check_tensor
from hpdm_kernels.attention import triton_backend as cross_attention_triton
from hpdm_kernels.attention.triton_backend import new_rows

MAX_HEAD_WIDTH = 128
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("hpdm::cross_attention_fwd", mutates_args=())
def _cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out [B,h,M,d]`` and the base-2 log-sum-exp of the scaled scores ``[B,h,M]``."""
    with torch.cuda.device_of(q):
        return cross_attention_triton.forward(q, k, v, scale, precision, key_mask)


@_cross_attention_fwd.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return new_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("hpdm::cross_attention_bwd", mutates_args=())
def _cross_attention_bwd(
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
    """Gradients of ``q``, ``k`` and ``v``."""
    with torch.cuda.device_of(q):
        return cross_attention_triton.backward(grad, q, k, v, out, lse, scale, precision, key_mask)


@_cross_attention_bwd.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return new_rows(q), new_rows(k), new_rows(k)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.precision, key_mask = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, key_mask)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, key_mask = ctx.saved_tensors
    return (*_cross_attention_bwd(grad, *tensors, ctx.scale, ctx.precision, key_mask), None, None, None)


_cross_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


# Counted as PyTorch counts its own fused attention: two products forward; backward five, the scores recomputed once.
@register_flop_formula(torch.ops.hpdm.cross_attention_fwd)
def _fwd_flops(q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = q_shape
    return 2 * 2 * batch * heads * queries * k_shape[2] * width


@register_flop_formula(torch.ops.hpdm.cross_attention_bwd)
def _bwd_flops(grad_shape: Any, q_shape: Any, k_shape: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, queries, width = q_shape
    return 5 * 2 * batch * heads * queries * k_shape[2] * width


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of ``M`` queries to ``N`` keys, ``softmax(q @ k.T * scale) @ v`` (HPDM Fig. 11; RIN's read and write).

    Args:
        q: ``[B, h, M, d]`` queries; float16, bfloat16, float32, or float64 (``reference`` and ``torch`` alone). Any
            strides: a view into a fused projection is read in place.
        k: ``[B, h, N, d]`` keys, dtype and device of ``q``. ``d`` is at most 128.
        v: ``[B, h, N, d]`` values.
        scale: factor of the scores, any finite number; default ``1 / sqrt(d)``.
        key_mask: ``[B, N]`` bool, true where a key may be read (texts differ in length); ``None``: all may. Hidden keys
            and values get no gradient; they must be finite, since zero times NaN is NaN.
        precision: how the kernels take fp32 products: ``"ieee"``, ``"tf32x3"``, ``"tf32"``; ``None`` follows
            :func:`torch.get_float32_matmul_precision`. ``reference`` and ``torch`` leave it to PyTorch.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, h, M, d]`` of ``q``'s dtype. Gradients flow to ``q``, ``k`` and ``v``. A sample that may read no key gives
        zeros and zero gradients.

    Raises:
        TypeError: an argument is not a tensor, its dtype is no float or not ``q``'s, ``key_mask`` is not bool, or
            ``scale`` is no number.
        ValueError: wrong rank, sizes or device; ``scale`` not finite; unknown ``precision`` or ``backend``.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    check_tensor("q", q, ("B", "h", "M", "d"))
    batch, heads, _, width = q.shape
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"q: got head width {width}, expected at most {MAX_HEAD_WIDTH}")
    check_tensor("k", k, (batch, heads, "N", width), like=("q", q))
    check_tensor("v", v, tuple(k.shape), like=("q", q))
    if key_mask is not None:
        check_tensor("key_mask", key_mask, (batch, k.shape[2]), dtypes=(torch.bool,), like=("q", q), same_dtype=False)
    factor = check_scale(scale, width)
    precision = _backend.resolve_precision(precision)
    chosen = _backend.resolve(backend, "cross_attention", q, TRITON_DTYPES)
    if chosen == "reference":
        return reference.cross_attention(q, k, v, factor, key_mask)
    if chosen == "torch":
        mask = None if key_mask is None else key_mask[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=factor)
    # The products of 16-bit inputs are exact in fp32: one kernel whatever the setting.
    return _cross_attention_fwd(q, k, v, factor, precision if q.dtype is torch.float32 else "ieee", key_mask)[0]


def check_scale(scale: object, width: int) -> float:
    """The factor of the scores; raises as :func:`cross_attention` says."""
    if scale is None:
        return width**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, expected None or a finite number")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    return float(scale)
