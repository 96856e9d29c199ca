"""Attention in PyTorch that gives and takes the log-sum-exp, so that backward can go over a part of the keys at a time.

The signatures are those of :mod:`hpdm_kernels.attention.triton_backend`: the log-sum-exp is in base 2, and -inf
for queries without a key to read. On the CPU PyTorch's own fused kernels do it, the ones behind
``F.scaled_dot_product_attention``: forward and backward take 47 and 142 ms at 768 queries, 4096 keys and 4 heads of 64
on two cores, the formula written out 143 and 274 ms. Elsewhere the formula is written out, since PyTorch's fused
attention for CUDA is several functions, none of which takes every dtype and repeats its gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm_kernels.reference import coordinate_dtype

LOG2E = 1.4426950408889634


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``out`` and the log-sum-exp ``[B, h, M]``, which is fp64 for fp64 and else fp32. ``precision`` is PyTorch's."""
    if q.device.type != "cpu":
        return formula_forward(q, k, v, scale, key_mask)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=_additive(key_mask, q.dtype), scale=scale
    )
    if key_mask is not None:  # PyTorch says 0
        lse = lse.masked_fill(~key_mask.any(dim=1)[:, None, None], -torch.inf)
    return out, lse * LOG2E


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``; those of some of the keys, if ``out`` and ``lse`` are of all of them."""
    if q.device.type != "cpu":
        return formula_backward(grad, q, k, v, out, lse, scale, key_mask)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, _finite(lse) / LOG2E, 0.0, False, attn_mask=_additive(key_mask, q.dtype), scale=scale
    )
    return grads


def formula_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`forward` with the scores written out."""
    scores = _scores(q, k, scale, key_mask)
    lse = scores.logsumexp(dim=-1)
    return torch.exp(scores - _finite(lse)[..., None]).to(v.dtype) @ v, lse * LOG2E


def formula_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward` with the scores written out."""
    p = torch.exp(_scores(q, k, scale, key_mask) - _finite(lse)[..., None] / LOG2E)
    delta = (grad.to(p.dtype) * out.to(p.dtype)).sum(dim=-1, keepdim=True)
    ds = (((grad @ v.mT) - delta) * p * scale).to(q.dtype)
    return ds @ k, ds.mT @ q, p.to(grad.dtype).mT @ grad


def _scores(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    scores = (q @ k.mT).to(coordinate_dtype(q.dtype)) * scale
    return scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None], -torch.inf)


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if key_mask is None:
        return None
    return torch.zeros_like(key_mask, dtype=dtype).masked_fill(~key_mask, -torch.inf)[:, None, None]


def _finite(lse: Tensor) -> Tensor:
    """Where all scores are -inf any number will do: the weights are ``exp(-inf - lse) = 0``."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
