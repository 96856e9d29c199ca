"""The ops once more, by other means than :mod:`hpdm_kernels.reference`: what the fuzzer holds every backend against.

Interpolation is by matrices of floors and fractions, attention by an explicit softmax, patches by the overlap of
intervals, averages of tiles by padding and counting, norms by their moments. Positions are computed in fp64. The
functions take the arguments of the public ops. In fp64 their results are the truth; in the inputs' dtype they err as a
plain implementation does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SNAP = 2.0**-11
"""Edges of a window that are closer than this to a whole pixel are on it, by definition of ``sample_patches``."""


def _work(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp64 for fp64, else fp32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _centers(box: Tensor, axis: int, n: int) -> Tensor:
    """Centers of a box's ``n`` tokens on an axis, fp64 ``[B, n]``, in the unit of ``box [B, 6]``."""
    i = torch.arange(n, dtype=torch.float64, device=box.device)
    return box[:, axis, None].double() + box[:, 3 + axis, None].double() * (i + 0.5) / n


def interpolation(box: Tensor, source_box: Tensor, axis: int, n: int, m: int) -> Tensor:
    """Linear interpolation of ``n`` tokens from ``m`` on an axis, fp64 ``[B, n, m]``; ``m - 1`` and 0 are repeated."""
    origin, extent = source_box[:, axis, None].double(), source_box[:, 3 + axis, None].double()
    u = ((_centers(box, axis, n) - origin) / extent * m - 0.5).clamp(0, m - 1)
    low = u.floor()
    matrix = torch.zeros(*u.shape, m, dtype=torch.float64, device=box.device)
    matrix.scatter_add_(2, low.long()[..., None], (1 - u + low)[..., None])
    return matrix.scatter_add_(2, (low.long() + 1).clamp(max=m - 1)[..., None], (u - low)[..., None])


def _along_axes(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Applies three matrices ``[B, n, m]`` to the axes 1 to 3 of ``x [B, m, m, m, D]``, in the dtype of ``x``."""
    f, h, w = (matrix.to(x.dtype) for matrix in matrices)
    x = torch.einsum("bni,bijkd->bnjkd", f, x)
    x = torch.einsum("bnj,bijkd->binkd", h, x)
    return torch.einsum("bnk,bijkd->bijnd", w, x)


def sample_context(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Mean over the sources of trilinear samples."""
    dtype = sources[0].dtype
    parts = []
    for k, (source, source_box, sizes) in enumerate(zip(sources, source_boxes, source_grids)):
        rows = torch.arange(len(box), device=box.device) if source_index is None else source_index[:, k].long()
        matrices = [interpolation(box, source_box[rows], a, grid[a], sizes[a]) for a in range(3)]
        parts.append(_along_axes(source[rows].to(_work(dtype)).unflatten(1, tuple(sizes)), matrices).flatten(1, 3))
    return (torch.stack(parts).sum(dim=0) / len(parts)).to(dtype)


def _coordinates(box: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Coordinates of a patch's tokens in the video, ``[B, N, 3]``."""
    axes = [_centers(box, a, grid[a]) for a in range(3)]
    rows = [torch.stack([g.flatten() for g in torch.meshgrid(*c, indexing="ij")], dim=1) for c in zip(*axes)]
    return torch.stack(rows).to(dtype)


def fuse_context(
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    **options: Any,
) -> Tensor:
    """Three products, for the tokens, their context and their coordinates, of one concatenation."""
    parts = [x, sample_context(sources, source_boxes, box, source_grids, grid, **options)]
    if weight.shape[1] > 2 * x.shape[2]:
        parts.append(_coordinates(box, grid, x.dtype))
    out = torch.cat(parts, dim=2) @ weight.t()
    return out if bias is None else out + bias


def fuse_projected(
    x: Tensor,
    projected: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    **options: Any,
) -> Tensor:
    """As :func:`fuse_context`, of sources that are multiplied already."""
    d = x.shape[2]
    out = x @ weight[:, :d].t() + sample_context(projected, source_boxes, box, source_grids, grid, **options)
    if weight.shape[1] > 2 * d:
        out = out + _coordinates(box, grid, x.dtype) @ weight[:, 2 * d :].t()
    return out if bias is None else out + bias


def project_sources(sources: Sequence[Tensor], weight: Tensor, **_: Any) -> tuple[Tensor, ...]:
    """Products with the context columns."""
    d = weight.shape[0]
    return tuple(source @ weight[:, d : 2 * d].t() for source in sources)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, key_mask: Tensor | None = None, **_: Any
) -> Tensor:
    """Softmax written out, over the keys that may be read."""
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    top = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - top.masked_fill(top == -torch.inf, 0)).exp()
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1)) @ v


def packed_attention(q: Tensor | None, packed: Tensor, **options: Any) -> Tensor:
    """Attention of the parts, taken by their indices."""
    parts = [packed[:, :, i].transpose(1, 2) for i in range(packed.shape[2])]
    return cross_attention(*(parts if q is None else (q, *parts)), **options)


def read_tokens(q: Tensor, tokens: Tensor | Sequence[Tensor], weight_kv: Tensor, **options: Any) -> Tensor:
    """Attention to keys and values that are projected before."""
    sequences = [tokens] if isinstance(tokens, Tensor) else tokens
    rows = torch.cat([t.to(q.dtype) for t in sequences], dim=1)
    kv = (rows @ weight_kv.to(q.dtype).t()).unflatten(2, (2, q.shape[1], q.shape[3]))  # [B, N, 2, h, d]
    k, v = kv.permute(2, 0, 3, 1, 4)
    return cross_attention(q, k, v, **options)


def temporal_attention(qkv: Tensor, rel_k: Tensor, rel_v: Tensor, **_: Any) -> Tensor:
    """Frames as queries one after the other; each meets keys and values with the embeddings already added."""
    frames, (rows, width) = qkv.shape[1], rel_k.shape
    q, k, v = qkv.unflatten(3, (3, -1, width)).permute(3, 1, 0, 2, 4, 5)  # [T, B, N, h, d] each
    keys, values = rel_k.to(qkv.dtype), rel_v.to(qkv.dtype)
    out = []
    for t in range(frames):
        at = [min(max(s - t + rows // 2, 0), rows - 1) for s in range(frames)]
        scores = ((k + keys[at][:, None, None, None]) * q[t]).sum(-1, keepdim=True) * width**-0.5  # [S, B, N, h, 1]
        weights = (scores - scores.detach().amax(dim=0)).exp()
        weights = weights / weights.sum(dim=0)
        out.append((weights * (v + values[at][:, None, None, None])).sum(dim=0))
    return torch.stack(out, dim=1).flatten(3)


def window_edges(box: Tensor, axis: int, n: int, pixels: int) -> Tensor:
    """Low and high edges of the windows of ``n`` outputs on an axis, fp64 ``[2, B, n]`` in pixels, not yet snapped."""
    half = (box[:, 3 + axis, None].double() * pixels / n).clamp(min=1) / 2
    center = _centers(box, axis, n) * pixels
    return torch.stack([center - half, center + half])


def _overlap(box: Tensor, axis: int, n: int, pixels: int) -> Tensor:
    """The share of each pixel in the windows of an axis, fp64 ``[B, n, pixels]``; border pixels go on outside."""
    edges = window_edges(box, axis, n, pixels)
    whole = edges.round()
    low, high = torch.where((edges - whole).abs() < SNAP, whole, edges)[..., None]
    # The length of [low, high] below each of the lines between pixels; differences are the pixels' shares.
    lines = torch.arange(1, pixels, dtype=torch.float64, device=box.device)
    below = (torch.minimum(high, lines) - low).clamp(min=0)
    ends = torch.zeros_like(low), high - low
    return torch.cat([ends[0], below, ends[1]], dim=2).diff(dim=2) / (high - low)


def sample_patches(video: Tensor, box: Tensor, size: Sequence[int], **_: Any) -> Tensor:
    """Every output is the mean over its window."""
    dtype = torch.float32 if video.dtype is torch.uint8 else video.dtype
    x = video.to(_work(dtype)).movedim(1, 4)
    matrices = [_overlap(box, a, size[a], video.shape[2 + a]) for a in range(3)]
    return _along_axes(x, matrices).movedim(4, 1).to(dtype)


def extract_tiles(video: Tensor, origins: Tensor, tile_size: Sequence[int], **_: Any) -> Tensor:
    """Reads every voxel of every tile by its index in the flat video."""
    h, w = video.shape[3:]
    i, j, k = (torch.arange(n) for n in tile_size)
    o = origins.long().cpu()[:, :, None]
    frame, row, column = o[:, 0] + i, o[:, 1] + j, o[:, 2] + k  # [T, f], [T, h], [T, w]
    index = (frame[:, :, None, None] * h + row[:, None, :, None]) * w + column[:, None, None, :]
    tiles = video.flatten(2)[:, :, index.flatten().to(video.device)]  # [B, C, T * f * h * w]
    return tiles.unflatten(2, index.shape).transpose(1, 2)


def average_tiles(
    tiles: Tensor,
    origins: Tensor,
    size: Sequence[int],
    x: Tensor | None = None,
    alpha: float = 0.0,
    beta: float = 1.0,
    weights: Sequence[Tensor] | None = None,
    **_: Any,
) -> Tensor:
    """Pads every tile to the size of the video; sums tiles and ones, or tiles times weights and weights."""
    work = tiles.to(_work(tiles.dtype))
    weight = torch.ones_like(work[0, 0, 0])
    if weights is not None:
        weight = torch.einsum("i,j,k->ijk", *(w.to(work.dtype) for w in weights))
    total, count = torch.zeros((), dtype=work.dtype, device=work.device), torch.zeros((), device=work.device)
    for t, origin in enumerate(origins.tolist()):
        margins = [(o, n - o - m) for o, n, m in zip(origin, size, tiles.shape[3:])]
        padding = [side for margin in margins[::-1] for side in margin]
        total = total + F.pad(weight * work[:, t], padding)
        count = count + F.pad(weight, padding)
    mean = total / count * beta
    return (mean if x is None else mean + alpha * x.to(work.dtype)).to(tiles.dtype)


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean, variance and modulation one after the other."""
    y = x if branch is None else gated_residual(x, branch, torch.ones_like(shift) if gate is None else gate)
    work = y.to(_work(x.dtype))
    centered = work - work.mean(dim=2, keepdim=True)
    normal = centered / (centered.square().mean(dim=2, keepdim=True) + eps).sqrt()
    out = (normal.to(x.dtype) * (1 + scale)[:, None] + shift[:, None]).to(x.dtype)
    return out if branch is None else (y, out)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, **_: Any) -> Tensor:
    """A product and a sum."""
    return (x + gate[:, None] * branch).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor, **_: Any) -> Tensor:
    """The formula with a hyperbolic tangent."""
    work = (x + bias).to(_work(x.dtype))
    return (work / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (work + 0.044715 * work**3)))).to(x.dtype)


def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    over: str = "frame",
    act: str = "silu",
    pad: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-5,
    **_: Any,
) -> Tensor:
    """Moments over axes of the split channels; edges are repeated by their indices."""
    work = _work(x.dtype)
    axes = (2, 3, 5) if over == "frame" else (1, 2, 3, 5)
    split = x.to(work).unflatten(4, (groups, -1))
    centered = split - split.mean(axes, keepdim=True)
    normal = (centered / (centered.square().mean(axes, keepdim=True) + eps).sqrt()).flatten(4)
    out = normal * weight.to(work) + bias.to(work)
    if scale is not None and shift is not None:
        factor, added = (t.to(work).reshape(len(x), -1, 1, 1, x.shape[4]) for t in (1 + scale, shift))
        out = out * factor + added
    if act == "silu":
        out = out * torch.sigmoid(out)
    for axis, (front, back) in enumerate(pad or (), start=1):
        n = out.shape[axis]
        out = out.index_select(axis, torch.arange(-front, n + back, device=x.device).clamp(0, n - 1))
    return out.to(x.dtype)
