"""Random configurations of the attention ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import hpdm_kernels
from hpdm_kernels.testing import formulas
from hpdm_kernels.testing.case import Arguments, Case
from hpdm_kernels.testing.draw import Draw

WIDTHS = (1, 2, 3, 5, 8, 16, 24, 40, 64, 80, 128, 160, 256)
SCALES = (None, None, None, -0.5, 0.0, 0.01, 1, 5.0)


def _mask(draw: Draw, batch: int, keys: int) -> Tensor | None:
    """No mask, or one that hides some keys of a sample, or all."""
    if draw.chance(0.5):
        return None
    mask = torch.rand(batch, keys, generator=draw.generator) < draw.choose((0.1, 0.5, 0.9))
    if draw.chance(0.3):
        mask[draw.random.randrange(batch)] = False
    return draw.view(mask)


def _terms(
    q: Tensor, k: Tensor, v: Tensor, k_terms: Tensor, v_terms: Tensor, grad: Tensor, arguments: Arguments
) -> tuple[float, dict[str, Tensor]]:
    """The largest sum of terms of a score, and the sums of absolute terms of output and gradients.

    ``k_terms`` and ``v_terms`` are those of keys and values, which may be sums themselves. Rounding is relative to
    these sums, not to what cancelling leaves of them: with one key ``q`` and ``k`` have no gradient.
    """
    scale = arguments.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    one = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:3], k.shape[2])
    p = formulas.cross_attention(q, k, one, scale, arguments.get("key_mask"))
    dp = grad.abs() @ v_terms.mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True)) * abs(scale)
    scores = (q.abs() @ k_terms.mT).max().item() * abs(scale)
    return scores, {
        "out": p @ v_terms, "q": ds @ k_terms, "k": ds.mT @ q.abs(), "v": p.mT @ grad.abs(),
    }  # fmt: skip


def _largest(terms: dict[str, Tensor], scores: float, width: int) -> list[float]:
    """The largest of each kind of ``terms``, grown with the scores: their rounding changes the weights by a factor.

    A score sums ``width`` products. In an expanded view these are all equal, and so are the errors of adding them up:
    they grow with the width instead of cancelling.
    """
    return [t.max().item() * (1 + scores / 10 * (1 + width / 32)) for t in terms.values()]


def cross_attention(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.cross_attention`."""
    batch, heads, width = draw.size(4), draw.size(3), draw.choose(WIDTHS)
    queries, keys = draw.rows(40), draw.rows(60)
    arguments: Arguments = {
        "q": draw.normal(batch, heads, queries, width, dtype=dtype),
        "k": draw.normal(batch, heads, keys, width, dtype=dtype),
        "v": draw.normal(batch, heads, keys, width, dtype=dtype),
        "scale": draw.choose(SCALES),
        "key_mask": _mask(draw, batch, keys),
    }

    def sizes(wide: Arguments, grads: Sequence[Tensor]) -> list[float]:
        q, k, v = wide["q"], wide["k"], wide["v"]
        scores, terms = _terms(q, k, v, k.abs(), v.abs(), grads[0], wide)
        return _largest(terms, scores, q.shape[-1])

    return Case(hpdm_kernels.cross_attention, formulas.cross_attention, arguments, ("q", "k", "v"), 6.0, 32.0, sizes)


def packed_attention(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.packed_attention`, with queries apart or within."""
    batch, heads, width, keys = draw.size(4), draw.size(3), draw.choose(WIDTHS), draw.rows(60)
    apart = draw.chance(0.5)
    arguments: Arguments = {
        "q": draw.normal(batch, heads, draw.rows(40), width, dtype=dtype) if apart else None,
        "packed": draw.normal(batch, keys, 2 if apart else 3, heads, width, dtype=dtype),
        "scale": draw.choose(SCALES),
        "key_mask": _mask(draw, batch, keys),
    }

    def sizes(wide: Arguments, grads: Sequence[Tensor]) -> list[float]:
        parts = wide["packed"].permute(2, 0, 3, 1, 4)  # [2 or 3, B, h, N, d]
        q, k, v = (wide["q"], *parts) if apart else parts
        scores, terms = _terms(q, k, v, k.abs(), v.abs(), grads[0], wide)
        terms["packed"] = torch.stack([terms.pop(name) for name in ("kv" if apart else "qkv")])
        return _largest(terms, scores, q.shape[-1])

    names = ("q", "packed")
    return Case(hpdm_kernels.packed_attention, formulas.packed_attention, arguments, names, 6.0, 32.0, sizes)


def read_tokens(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.read_tokens`."""
    batch, heads, head, width = draw.size(4), draw.size(3), draw.choose(WIDTHS), draw.size(12)
    lengths = [draw.rows(60) for _ in range(draw.choose((1, 1, 2, 3)))]
    other = dtype if backend == "triton" or draw.chance(0.7) else draw.choose((torch.bfloat16, torch.float32))
    tokens = tuple(draw.normal(batch, n, width, dtype=other) for n in lengths)
    arguments: Arguments = {
        "q": draw.normal(batch, heads, draw.rows(20), head, dtype=dtype),
        "tokens": tokens[0] if len(tokens) == 1 and draw.chance(0.5) else tokens,
        "weight_kv": draw.normal(2 * heads * head, width, dtype=draw.choose((dtype, other))),
        "scale": draw.choose(SCALES),
        "key_mask": _mask(draw, batch, sum(lengths)),
        "piece_rows": draw.choose((1, 7, 20, 50, 8192)),
    }

    def sizes(wide: Arguments, grads: Sequence[Tensor]) -> list[float]:
        q, weight = wide["q"], wide["weight_kv"]
        several = isinstance(wide["tokens"], tuple)
        rows = torch.cat(wide["tokens"], dim=1) if several else wide["tokens"]

        def split(kv: Tensor) -> Tensor:
            return kv.unflatten(2, (2, heads, head)).permute(2, 0, 3, 1, 4)  # [2, B, h, N, d]

        (k, v), (k_terms, v_terms) = split(rows @ weight.t()), split(rows.abs() @ weight.t().abs())
        scores, terms = _terms(q, k, v, k_terms, v_terms, grads[0], wide)
        of_kv = torch.stack([terms.pop("k"), terms.pop("v")]).permute(1, 3, 0, 2, 4).flatten(2)  # [B, N, 2*h*d]
        of_tokens = of_kv @ weight.abs()  # [B, N, D]
        parts = of_tokens.split(lengths, dim=1)
        terms |= {f"tokens {i}": part for i, part in enumerate(parts)}
        terms["weight"] = of_kv.flatten(0, 1).t() @ rows.abs().flatten(0, 1)
        return _largest(terms, scores, q.shape[-1])

    names = ("q", "tokens", "weight_kv")
    arguments["recompute"] = draw.choose((None, True, True, False))
    return Case(hpdm_kernels.read_tokens, formulas.read_tokens, arguments, names, 6.0, 32.0, sizes)
