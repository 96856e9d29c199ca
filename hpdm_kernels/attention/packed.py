"""Attention to keys and values that one projection wrote beside each other: their gradient is packed the same way.

A module's keys and values, in self-attention its queries too, are parts of one product. If the op took the parts, each
would get a gradient of its own, and autograd would copy these into that of the product. Here the kernels read the parts
where they are and write the gradients of keys and values beside each other; that of packed queries is copied there.

The memory of ``packed`` is that of the product: ``[B, N, 2, h, d]`` for keys and values, ``[B, M, 3, h, d]`` with
queries before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm_kernels.attention import torch_backend, triton_backend
from hpdm_kernels.attention.layout import empty_heads, unpack


# All functions have the parameters of the registered ops.
def forward(
    q: Tensor | None, packed: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``out [B, h, M, d]`` and the base-2 log-sum-exp, fp32 ``[B, h, M]``, by the kernels.

    Args:
        q: ``[B, h, M, d]``, or ``None`` if ``packed`` has the queries.
        packed: ``[B, N, 2, h, d]`` or ``[B, M, 3, h, d]``.
        scale, precision, key_mask: see :func:`hpdm_kernels.attention.triton_backend.forward`.
    """
    return triton_backend.forward(*unpack(q, packed), scale, precision, key_mask)


def backward(
    grad: Tensor,
    q: Tensor | None,
    packed: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> list[Tensor]:
    """Gradients ``[dpacked]``, or ``[dq, dpacked]`` if there are queries apart; ``dpacked`` is contiguous.

    Args:
        grad: gradient of ``out``, ``[B, h, M, d]``.
        out, lse: results of :func:`forward`, which has the other arguments.
    """
    dq, dpacked = None if q is None else empty_heads(q), packed.new_empty(packed.shape)
    results = unpack(dq, dpacked)
    triton_backend.backward(grad, *unpack(q, packed), out, lse, scale, precision, key_mask, results)
    return [dpacked] if dq is None else [dq, dpacked]


def portable_forward(
    q: Tensor | None, packed: Tensor, scale: float, precision: str, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`forward` in PyTorch's own operations."""
    return torch_backend.forward(*unpack(q, packed), scale, precision, key_mask)


def portable_backward(
    grad: Tensor,
    q: Tensor | None,
    packed: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    precision: str,
    key_mask: Tensor | None = None,
) -> list[Tensor]:
    """:func:`backward` in PyTorch's own operations."""
    grads = torch_backend.backward(grad, *unpack(q, packed), out, lse, scale, precision, key_mask)
    apart, parts = grads[: 3 - packed.shape[2]], grads[3 - packed.shape[2] :]
    return [*apart, torch.stack([part.transpose(1, 2) for part in parts], dim=2)]
