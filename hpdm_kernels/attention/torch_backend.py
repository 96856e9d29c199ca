"""Attention in PyTorch that returns and accepts the log-sum-exp, so that backward can process keys in chunks.

The signatures are those of :mod:`hpdm_kernels.attention.triton_backend`. The log-sum-exp is in base 2, and -inf for
queries whose keys are all hidden. On the CPU PyTorch's fused kernels do the work, the ones behind
``F.scaled_dot_product_attention``: they are faster than the plain formula. That function checks what its kernels
require and else computes something else; here the kernels are called past it, because it returns no log-sum-exp, so
:func:`forward` and :func:`backward` see to the requirements themselves. Other devices use the plain formula, because
none of PyTorch's fused attention functions for CUDA both takes every dtype and gives the same gradients in every run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels._layout import dense_rows
from hpdm_kernels.boxes import coordinate_dtype

LOG2E = 1.4426950408889634
FEWEST_KEYS = 16
"""PyTorch's fused kernel for the CPU loses a NaN among fewer scores than a vector register holds: it gives zeros."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out [B, h, M, d]`` and the log-sum-exp ``[B, h, M]``, which is fp64 for fp64 inputs and else fp32.

    ``q`` is ``[B, h, M, d]``, ``k`` and ``v`` are ``[B, h, N, d]``, ``key_mask`` is ``[B, N]`` bool. ``precision`` is
    not used: PyTorch's own setting governs its products.
    """
    if not _has_kernel(q, k):
        return formula_forward(q, k, v, scale, key_mask)
    q, k, v = map(dense_rows, (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=_additive(key_mask, q.dtype), scale=scale
    )
    if key_mask is not None:  # PyTorch returns 0 where all keys are hidden
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
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``dq [B, h, M, d]``, ``dk`` and ``dv`` ``[B, h, N, d]``, from ``grad [B, h, M, d]``, that of ``out``.

    ``k`` and ``v`` may be a subset of the keys and values, as long as ``out`` and ``lse`` are the results for all keys.
    """
    if not _has_kernel(q, k):
        return formula_backward(grad, q, k, v, out, lse, scale, key_mask)
    grad, q, k, v, out = map(dense_rows, (grad, q, k, v, out))
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, _finite(lse) / LOG2E, 0.0, False, attn_mask=_additive(key_mask, q.dtype), scale=scale
    )
    return grads


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    """PyTorch's own attention and gradients: ``out [B, h, M, d]``. The arguments are those of :func:`forward`."""
    if q.device.type == "cpu" and k.shape[2] < FEWEST_KEYS:
        return formula_forward(q, k, v, scale, key_mask)[0]
    mask = None if key_mask is None else key_mask[:, None, None]  # [B, 1, 1, N]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _has_kernel(q: Tensor, k: Tensor) -> bool:
    """Whether PyTorch's fused kernel computes attention of ``q [B, h, M, d]`` to ``k [B, h, N, d]``.

    Of the conditions of ``use_flash_attention_cpp``, PyTorch's own choice on the CPU, these are left to look at: the
    shapes and dtypes of the ops fulfil the others, and :func:`dense_rows` gives last axes of stride 1.
    """
    switched_on = torch.backends.cuda.flash_sdp_enabled()  # for every device, in spite of its name
    return q.device.type == "cpu" and k.shape[2] >= FEWEST_KEYS and switched_on


def formula_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """:func:`forward` by the plain formula, with the scores in memory."""
    scores = _scores(q, k, scale, key_mask)  # [B, h, M, N]
    lse = scores.logsumexp(dim=-1)  # [B, h, M]
    return torch.exp(scores - _finite(lse)[..., None]).to(v.dtype) @ v, lse * LOG2E


def formula_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward` by the plain formula, with the scores in memory."""
    p = torch.exp(_scores(q, k, scale, key_mask) - _finite(lse)[..., None] / LOG2E)  # [B, h, M, N]
    delta = (grad.to(p.dtype) * out.to(p.dtype)).sum(dim=-1, keepdim=True)  # [B, h, M, 1]
    ds = (((grad @ v.mT) - delta) * p * scale).to(q.dtype)  # [B, h, M, N]
    return ds @ k, ds.mT @ q, p.to(grad.dtype).mT @ grad


def _scores(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    """Scaled scores ``[B, h, M, N]``, -inf where a key is hidden."""
    scores = (q @ k.mT).to(coordinate_dtype(q.dtype)) * scale
    return scores if key_mask is None else scores.masked_fill(~key_mask[:, None, None], -torch.inf)


def _additive(key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask to be added to the scores, ``[B, 1, 1, N]``: 0, or -inf where a key is hidden."""
    if key_mask is None:
        return None
    bias = torch.zeros(key_mask.shape, dtype=dtype, device=key_mask.device)  # contiguous, as the kernels require
    return bias.masked_fill_(~key_mask, -torch.inf)[:, None, None]


def _finite(lse: Tensor) -> Tensor:
    """Replaces -inf, where all scores are -inf, by 0: the weights ``exp(-inf - lse)`` are then 0, not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)
