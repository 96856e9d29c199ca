"""Temporal attention at the sizes of LVDM's U-Net on 32x32 latents: 4, 5 or 16 frames, widths of 256 to 1024.

The peers begin with the projection ``[B, T, N, 3 C]`` and end with ``[B, T, N, C]``, too:

- PyTorch: the formula by batched products, those with embeddings for each frame at once, after one copy of each part;
- the same under ``torch.compile``;
- the formula with every product written out as a sum over channels, under ``torch.compile``, which makes loops of its
  own of it without storing the products;
- PyTorch's fused attention and FlexAttention. What keys get from embeddings is a bias of the scores, computed before;
  what values get needs the weights, which neither returns: columns of the unit matrix beside the values give them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from hpdm_kernels import temporal_attention
from hpdm_kernels.reference import distance_rows

# Frames, positions, heads, width of a head: the levels of the U-Net, of the one that interpolates, of longer clips.
SIZES = [
    (4, 1024, 4, 64), (4, 256, 4, 128), (4, 64, 4, 192), (4, 16, 4, 256), (5, 1024, 4, 64), (16, 1024, 4, 64),
    (16, 64, 4, 192),
]  # fmt: skip
# On a CPU the compiled peers add the terms of a gradient one after the other.
BUDGETS = dict.fromkeys(("torch.compile", "torch.compile, sums", "FlexAttention", "fused attention"), 32.0)


def sequences(qkv: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, N, h, T, d]``, as views."""
    q, k, v = qkv.unflatten(3, (3, -1, width)).permute(3, 0, 2, 4, 1, 5).unbind(0)
    return q, k, v


def of_pairs(table: Tensor, frames: int) -> Tensor:
    return table[distance_rows(table, frames)]  # [T, T, d]


def products(qkv: Tensor, rel_k: Tensor, rel_v: Tensor) -> Tensor:
    """Batched products of ``[R, T, d]``, R sequences."""
    batch, frames, positions, _ = qkv.shape
    width = rel_k.shape[1]
    keys, values = of_pairs(rel_k, frames), of_pairs(rel_v, frames)
    q, k, v = (t.reshape(-1, frames, width) for t in sequences(qkv, width))
    of_keys = torch.bmm(q.transpose(0, 1), keys.mT).transpose(0, 1)
    weights = torch.baddbmm(of_keys, q, k.mT, beta=width**-0.5, alpha=width**-0.5).softmax(dim=-1)  # [R, T, T]
    of_values = torch.bmm(weights.transpose(0, 1), values).transpose(0, 1)
    out = torch.baddbmm(of_values, weights, v).view(batch, positions, -1, frames, width)
    return out.permute(0, 3, 1, 2, 4).flatten(3)


def sums(qkv: Tensor, rel_k: Tensor, rel_v: Tensor) -> Tensor:
    """Products written out: ``[B, T, T, N, h, d]``, which only a compiler does without storing."""
    frames, width = qkv.shape[1], rel_k.shape[1]
    q, k, v = qkv.unflatten(3, (3, -1, width)).unbind(3)  # [B, T, N, h, d] each
    keys, values = (of_pairs(table, frames)[:, :, None, None] for table in (rel_k, rel_v))  # [T, T, 1, 1, d]
    weights = ((q[:, :, None] * (k[:, None] + keys)).sum(-1) * width**-0.5).softmax(2)  # [B, T, T, N, h]
    return (weights[..., None] * (v[:, None] + values)).sum(2).flatten(3)


def by_fused(attend: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """Attention that takes a bias ``[B N, h, T, T]``, with the values' embeddings by its weights."""

    def run(qkv: Tensor, rel_k: Tensor, rel_v: Tensor) -> Tensor:
        batch, frames, positions, _ = qkv.shape
        width = rel_k.shape[1]
        keys, values = of_pairs(rel_k, frames), of_pairs(rel_v, frames)
        q, k, v = (t.flatten(0, 1) for t in sequences(qkv, width))  # [B N, h, T, d] each
        bias = torch.einsum("nhtd,tsd->nhts", q, keys) * width**-0.5
        columns = torch.eye(frames, dtype=v.dtype, device=v.device).expand(*v.shape[:2], frames, frames)
        both = attend(q, k, torch.cat((v, columns), dim=-1), bias, width**-0.5)
        out, weights = both.split((width, frames), dim=-1)
        out = out + torch.einsum("nhts,tsd->nhtd", weights, values)
        return out.unflatten(0, (batch, positions)).permute(0, 3, 1, 2, 4).flatten(3)

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """PyTorch's fused kernels want heads of one width for all three: zeros beside queries and keys."""
    q, k = (F.pad(t, (0, v.shape[-1] - t.shape[-1])) for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    def with_bias(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score + bias[b, h, t, s]

    return flex_attention(q, k, v, score_mod=with_bias, scale=scale)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_temporal_attention(compare, backends, device, generator, size, direction):
    frames, positions, heads, width = size
    table = (2 * frames - 1, width)
    shapes = ((1, frames, positions, 3 * heads * width), table, table)
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    compiled = {
        "torch.compile": torch.compile(products), "torch.compile, sums": torch.compile(sums),
        "FlexAttention": torch.compile(by_fused(flex)),
    }  # fmt: skip
    contenders = {"PyTorch": products, **compiled, "fused attention": by_fused(sdpa)}
    for backend in backends:
        contenders[f"hpdm {backend}"] = lambda *t, backend=backend: temporal_attention(*t, backend=backend)
    # Forward three parts are read and one is written; backward those and a gradient are read, and three written.
    parts = 4 + (7 if direction == "fwd+bwd" else 0)
    product = 2 * positions * frames * frames * heads * width
    compare(
        contenders, inputs=inputs, group="temporal_attention",
        shape=f"{frames} frames, {positions} positions, {heads} heads of {width}", direction=direction,
        reference="PyTorch", peers=[*compiled, "fused attention"], budgets=BUDGETS,
        bytes=parts * inputs[0].nbytes // 3, flops=product * (14 if direction == "fwd+bwd" else 4),
    )  # fmt: skip
