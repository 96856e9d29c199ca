"""RIN cross-attention: latents read tokens, and tokens read latents (HPDM Fig. 11).

``out = softmax(q @ k.T * scale) @ v`` for ``q [B,h,M,d]`` and ``k, v [B,h,N,d]``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels import _backend, reference
from hpdm_kernels._checks import check_tensor

MAX_HEAD_WIDTH = 128
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
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
        precision: how the kernels take fp32 products: ``"ieee"``, ``"tf32x3"``, ``"tf32"``; ``None`` follows
            :func:`torch.get_float32_matmul_precision`. ``reference`` and ``torch`` leave it to PyTorch.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, h, M, d]`` of ``q``'s dtype. Gradients flow to ``q``, ``k`` and ``v``.

    Raises:
        TypeError: an argument is not a tensor, its dtype is no float or not ``q``'s, or ``scale`` is no number.
        ValueError: wrong rank, sizes or device; ``scale`` not finite; unknown ``precision`` or ``backend``.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    check_tensor("q", q, ("B", "h", "M", "d"))
    batch, heads, _, width = q.shape
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"q: got head width {width}, expected at most {MAX_HEAD_WIDTH}")
    check_tensor("k", k, (batch, heads, "N", width), like=("q", q))
    check_tensor("v", v, tuple(k.shape), like=("q", q))
    scale = _check_scale(scale, width)
    _backend.resolve_precision(precision)
    chosen = _backend.resolve(backend, "cross_attention", q, ())
    if chosen == "reference":
        return reference.cross_attention(q, k, v, scale)
    if chosen == "torch":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    raise RuntimeError("cross_attention: backend='triton' cannot run: no kernel yet")


def _check_scale(scale: object, width: int) -> float:
    if scale is None:
        return width**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {scale!r}, expected None or a finite number")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number")
    return float(scale)
