"""RIN's read with its projection (paper Fig. 11): keys and values exist for one chunk of tokens at a time.

    out = softmax(q @ K.T * scale) @ V,   [K, V] = tokens @ weight.T

with ``q, out [B, h, M, d]``, ``tokens [B, N, D]`` and ``weight [2*h*d, D]``. The model keeps the tokens anyway, and one
product turns them into keys and values. So backward recomputes keys and values instead of saving ``[B, N, 2*h*d]``.
Besides the inputs, ``out`` and the log-sum-exp ``[B, h, M]`` are saved: unlike with checkpointing, the attention itself
does not run again.

A chunk has at most ``piece_rows`` tokens: several whole samples, or a range of tokens of one sample. Results of such
ranges are combined by their log-sum-exps. Sums over chunks are taken in the order of the tokens, so every run gives the
same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels.attention import torch_backend, triton_backend
from hpdm_kernels.attention.layout import empty_heads
from hpdm_kernels.boxes import coordinate_dtype

PIECE_ROWS = 8192
"""Enough rows for a product at full speed; with ``h * d = 512`` in fp32 their keys and values take 32 MiB."""


class TokenRange(NamedTuple):
    """A range of tokens of one sequence."""

    sequence: int
    """Index of the sequence."""
    tokens: slice
    """The range within that sequence."""
    columns: slice
    """The range within all sequences concatenated."""


def token_chunks(batch: int, lengths: Sequence[int], rows: int) -> Iterator[tuple[slice, list[TokenRange]]]:
    """Cuts ``batch`` samples into chunks of at most ``rows`` tokens; ``lengths`` are those of a sample's sequences.

    Yields:
        A range of samples to process together, and the token ranges, of about equal size, to process them in.
    """
    samples = max(1, rows // sum(lengths))
    ranges, before = [], 0
    for sequence, length in enumerate(lengths):
        step = -(-length // -(-length // rows))
        for start in range(0, length, step):
            stop = min(start + step, length)
            ranges.append(TokenRange(sequence, slice(start, stop), slice(before + start, before + stop)))
        before += length
    for start in range(0, batch, samples):
        yield slice(start, min(start + samples, batch)), ranges


def project(rows: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, h, n, d]`` of ``rows [B, n, D]``, two views of one product with ``weight [2*h*d, D]``."""
    k, v = F.linear(rows, weight).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # [2, B, h, n, d]
    return k, v


def _combine(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Combines the results of several ranges of keys, each ``(out, base-2 log-sum-exp)``, into that of all keys."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([lse for _, lse in parts])  # [ranges, B, h, M]
    top = lse.amax(dim=0)
    weights = torch.exp2(lse - top.masked_fill(top == -torch.inf, 0.0))
    total = weights.sum(dim=0)  # [B, h, M]
    out = sum(out * w[..., None] for (out, _), w in zip(parts, weights)) / total[..., None]  # [B, h, M, d]
    return out.masked_fill((total == 0)[..., None], 0.0), top + torch.log2(total)


def _attention(backend: str) -> ModuleType:
    return triton_backend if backend == "triton" else torch_backend


# Both functions have the parameters of the registered ops.
def forward(
    q: Tensor,
    tokens: Sequence[Tensor],
    weight: Tensor,
    key_mask: Tensor | None,
    scale: float,
    piece_rows: int,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``out [B, h, M, d]`` and the base-2 log-sum-exp ``[B, h, M]``.

    Args:
        q: ``[B, h, M, d]``.
        tokens: several ``[B, N_i, D]``.
        weight: ``[2*h*d, D]``.
        key_mask: ``[B, sum of N_i]`` bool, or ``None``.
        scale, piece_rows, precision: see :func:`hpdm_kernels.read_tokens`.
        backend: ``"torch"`` or ``"triton"``.
    """
    attention = _attention(backend)
    weight = weight.to(q.dtype)
    out, lse = empty_heads(q), q.new_empty(q.shape[:3], dtype=coordinate_dtype(q.dtype))
    for samples, ranges in token_chunks(q.shape[0], [t.shape[1] for t in tokens], piece_rows):
        parts = []
        for sequence, piece, columns in ranges:
            mask = None if key_mask is None else key_mask[samples, columns]
            rows = tokens[sequence][samples, piece].to(q.dtype)  # [b, n, D]
            # Do not bind k, v: they must be freed before the next chunk is projected.
            parts.append(attention.forward(q[samples], *project(rows, weight, q.shape[1]), scale, precision, mask))
        out[samples], lse[samples] = _combine(parts)
    return out, lse


def backward(
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
    """Gradients ``[dq, dweight, *dtokens]``, of the shapes and dtypes of the inputs.

    Args:
        grad: gradient of ``out``, ``[B, h, M, d]``.
        out, lse: results of :func:`forward`, which has the other arguments.
    """
    attention = _attention(backend)
    cast_weight, sum_dtype = weight.to(q.dtype), coordinate_dtype(q.dtype)
    # Sums over chunks are fp32 for 16-bit inputs.
    dq = empty_heads(q, sum_dtype).zero_()
    dweight = torch.zeros(weight.shape, dtype=sum_dtype, device=weight.device)
    dtokens: dict[int, Tensor] = {}
    for samples, ranges in token_chunks(q.shape[0], [t.shape[1] for t in tokens], piece_rows):
        for sequence, piece, columns in ranges:
            rows = tokens[sequence][samples, piece].to(q.dtype)  # [b, n, D]
            k, v = project(rows, cast_weight, q.shape[1])  # [b, h, n, d]
            mask = None if key_mask is None else key_mask[samples, columns]
            dq_chunk, dk, dv = attention.backward(
                grad[samples], q[samples], k, v, out[samples], lse[samples], scale, precision, mask
            )
            del k, v
            dkv = torch.cat([t.transpose(1, 2).flatten(2) for t in (dk, dv)], dim=-1).flatten(0, 1)  # [b*n, 2*h*d]
            del dk, dv
            dq[samples] += dq_chunk
            dweight += dkv.t() @ rows.flatten(0, 1)
            if sequence not in dtokens:  # allocate only after keys and values of the first chunk are freed
                dtokens[sequence] = tokens[sequence].new_empty(tokens[sequence].shape)
            dtokens_chunk = dtokens[sequence][samples, piece].view(-1, weight.shape[1])  # [b*n, D]
            if dtokens_chunk.dtype == dkv.dtype:
                torch.mm(dkv, cast_weight, out=dtokens_chunk)
            else:
                dtokens_chunk.copy_(dkv @ cast_weight)
            del dkv
    return [dq.to(q.dtype), dweight.to(weight.dtype), *dtokens.values()]
