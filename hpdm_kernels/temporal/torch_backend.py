"""Temporal attention in PyTorch's own operations, without copies of the projection.

The parts of a head are matrices whose rows are far apart. Products take them as they are in two ways, neither of which
copies: one small product per position for what differs between positions, and one large product per frame for what a
frame has in common at all positions, which are the embeddings of its distances. Scores are kept as ``[S, T, N]``:
their softmax is then computed for many positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.temporal.distances import fold, of_pairs, sum_of_pairs


def forward(qkv: Tensor, rel_k: Tensor, rel_v: Tensor) -> tuple[Tensor, Tensor]:
    """Result and weights; see :func:`hpdm_kernels.temporal.ops.temporal_attention_fwd`."""
    width, frames = rel_k.shape[1], qkv.shape[1]
    work = coordinate_dtype(qkv.dtype)
    of_keys, of_values = (of_pairs(table, frames, work) for table in (rel_k, rel_v))  # [T, S, d] each
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    saved = of_keys.new_empty(len(out), out.shape[3] // width, frames, frames, out.shape[2])
    for b, head in _heads(out, width):
        q, k, v = (part[b].to(work) for part in _parts(qkv, head))  # [T, N, d] each
        weights = saved[b, head.start // width]  # [S, T, N]
        torch.softmax(_scores(q, k, of_keys).mul_(width**-0.5), dim=0, out=weights)
        by_frame = torch.bmm(weights.permute(1, 2, 0), of_values)  # [T, N, d]
        by_position = torch.bmm(_by_position(weights), v.transpose(0, 1))  # [N, T, d]
        out[b, ..., head] = by_frame.add_(by_position.transpose(0, 1))
    return out, saved


def backward(grad: Tensor, qkv: Tensor, rel_k: Tensor, rel_v: Tensor, saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; see :func:`hpdm_kernels.temporal.ops.temporal_attention_bwd`."""
    width, frames = rel_k.shape[1], qkv.shape[1]
    work = coordinate_dtype(qkv.dtype)
    of_keys, of_values = (of_pairs(table, frames, work) for table in (rel_k, rel_v))  # [T, S, d] each
    sums = of_keys.new_zeros(2, frames, frames, width)
    dqkv = qkv.new_empty(qkv.shape)
    for b, head in _heads(grad, width):
        q, k, v = (part[b].to(work) for part in _parts(qkv, head))  # [T, N, d] each
        above = grad[b, ..., head].to(work)
        weights = saved[b, head.start // width]  # [S, T, N]
        of_weights = _scores(above, v, of_values)
        inner = of_weights.sub_((weights * of_weights).sum(0)).mul_(weights).mul_(width**-0.5)
        dq, dk, dv = (part[b] for part in _parts(dqkv, head))
        at_positions = _by_position(inner)  # [N, T, S]
        by_frame = torch.bmm(inner.permute(1, 2, 0), of_keys)
        dq.copy_(by_frame.add_(torch.bmm(at_positions, k.transpose(0, 1)).transpose(0, 1)))
        # What a key gets from all queries: the scores of a position the other way round.
        dk.copy_(torch.bmm(at_positions.mT, q.transpose(0, 1)).transpose(0, 1))
        dv.copy_(torch.bmm(_by_position(weights).mT, above.transpose(0, 1)).transpose(0, 1))
        sums[0] += torch.bmm(inner.transpose(0, 1), q)
        sums[1] += torch.bmm(weights.transpose(0, 1), above)
    dkeys, dvalues = (
        fold(sum_of_pairs(pairs), len(table)).to(table.dtype) for pairs, table in zip(sums, (rel_k, rel_v))
    )
    return dqkv, dkeys, dvalues


def _heads(out: Tensor, width: int) -> Iterator[tuple[int, slice]]:
    """Every sample and every head's columns of ``out [B, T, N, h d]``."""
    for b in range(out.shape[0]):
        for first in range(0, out.shape[3], width):
            yield b, slice(first, first + width)


def _parts(qkv: Tensor, head: slice) -> Iterator[Tensor]:
    """Queries, keys and values of one head, ``[B, T, N, d]`` each, as views."""
    return (part[..., head] for part in qkv.chunk(3, dim=-1))


def _scores(q: Tensor, k: Tensor, of_pairs: Tensor) -> Tensor:
    """``q_t . (k_s + of_pairs[t, s])`` of ``[T, N, d]`` twice and ``[T, S, d]``: ``[S, T, N]``."""
    by_frame = torch.bmm(q, of_pairs.mT)  # [T, N, S]
    by_position = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0))  # [N, T, S]
    scores = q.new_empty(k.shape[0], *q.shape[:2])
    return torch.add(by_frame.permute(2, 0, 1), by_position.permute(2, 1, 0), out=scores)


def _by_position(scores: Tensor) -> Tensor:
    """``[S, T, N]`` as a matrix for each position, contiguous ``[N, T, S]``."""
    return scores.permute(2, 1, 0).contiguous()
