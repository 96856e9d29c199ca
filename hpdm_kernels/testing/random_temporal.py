"""Random configurations of temporal attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import hpdm_kernels
from hpdm_kernels.testing import formulas
from hpdm_kernels.testing.case import Arguments, Case
from hpdm_kernels.testing.draw import Draw

WIDTHS = (1, 2, 3, 5, 8, 16, 24, 40, 64, 80)
_MIXED = (torch.float32, torch.bfloat16, torch.float16)


def temporal_attention(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.temporal_attention`, with distances beyond the tables and without."""
    batch, frames, positions, heads = draw.size(3), draw.size(18), draw.rows(40), draw.size(3)
    width, rows = draw.choose(WIDTHS), 2 * draw.random.randrange(frames + 2) + 1
    other = draw.choose(_MIXED) if backend != "triton" and dtype in _MIXED and draw.chance(0.2) else dtype
    arguments: Arguments = {
        "qkv": draw.normal(batch, frames, positions, 3 * heads * width, dtype=dtype),
        "rel_k": draw.normal(rows, width, dtype=other),
        "rel_v": draw.normal(rows, width, dtype=other),
    }
    names = ("qkv", "rel_k", "rel_v")
    return Case(hpdm_kernels.temporal_attention, formulas.temporal_attention, arguments, names, 6.0, 32.0, _sizes)


def _sizes(arguments: Arguments, grads: Sequence[Tensor]) -> list[float]:
    """The largest sums of absolute terms, grown with the scores: their rounding changes the weights by a factor.

    Terms do not cancel here: with one frame queries and keys have no gradient at all.
    """
    qkv, rel_k, rel_v = (arguments[name] for name in ("qkv", "rel_k", "rel_v"))
    frames, (rows, width) = qkv.shape[1], rel_k.shape
    frame = torch.arange(frames)
    at = (frame - frame[:, None] + rows // 2).clamp(0, rows - 1)  # [T, S]
    q, k, v = qkv.unflatten(3, (3, -1, width)).permute(3, 0, 2, 4, 1, 5)  # [B, N, h, T, d] each
    p = torch.softmax((q @ k.mT + torch.einsum("...td,tsd->...ts", q, rel_k[at])) * width**-0.5, dim=-1)
    q, k, v, keys, values = (t.abs() for t in (q, k, v, rel_k[at], rel_v[at]))
    grad = grads[0].unflatten(3, (-1, width)).permute(0, 2, 3, 1, 4).abs()

    def products(rows: Tensor, others: Tensor, pairs: Tensor) -> Tensor:
        return rows @ others.mT + torch.einsum("...td,tsd->...ts", rows, pairs)

    def sums(weights: Tensor, others: Tensor, pairs: Tensor) -> Tensor:
        return weights @ others + torch.einsum("...ts,tsd->...td", weights, pairs)

    of_p = products(grad, v, values)
    inner = p * (of_p + (p * of_p).sum(-1, keepdim=True)) * width**-0.5
    of_qkv = (sums(inner, k, keys), inner.mT @ q, p.mT @ grad)
    tables = []
    for weights, other in ((inner, q), (p, grad)):
        of_pairs = torch.einsum("...ts,...td->tsd", weights, other).flatten(0, 1)
        tables.append(of_pairs.new_zeros(rows, width).index_add(0, at.flatten(), of_pairs))
    terms = [sums(p, v, values), torch.stack(of_qkv), *tables]
    scores = products(q, k, keys).max().item() * width**-0.5
    # In an expanded view the products of a score are equal, and so are the errors of adding them up.
    return [t.max().item() * (1 + scores / 10 * (1 + width / 32)) for t in terms]
