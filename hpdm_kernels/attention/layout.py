"""Memory layout of attention's tensors, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_heads(like: Tensor, dtype: torch.dtype | None = None, splits: int | None = None) -> Tensor:
    """An empty tensor of the shape of ``like``, ``[B, h, M, d]``, whose memory is laid out as ``[B, M, h, d]``.

    Merging the heads afterwards, ``out.transpose(1, 2).flatten(2)``, is then a view.

    Args:
        like: gives the shape and the device.
        dtype: dtype of the result; that of ``like`` by default.
        splits: adds a leading axis: the result is ``[splits, B, h, M, d]``.
    """
    batch, heads, rows, width = like.shape
    lead = (batch,) if splits is None else (splits, batch)
    return like.new_empty(*lead, rows, heads, width, dtype=dtype).transpose(-2, -3)


def unpack(q: Tensor | None, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[B, h, M, d]``, keys and values ``[B, h, N, d]``: views of ``packed``.

    Args:
        q: the queries, or ``None`` if ``packed`` has them.
        packed: ``[B, N, 2, h, d]``, keys and values, or ``[B, M, 3, h, d]``, queries, keys and values.
    """
    parts = [part.squeeze(2).transpose(1, 2) for part in packed.chunk(packed.shape[2], dim=2)]
    queries, k, v = parts if q is None else (q, *parts)
    return queries, k, v
