"""The six ops as the paper writes them, in plain PyTorch: the oracle, and the model's "kernels off".

Everything here is differentiable by autograd and takes any float dtype; called with float64 it is the truth that the
other backends are measured against. Arguments are assumed valid: the public functions have checked them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def coordinate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Coordinates are fp32 unless the data is fp64: a 16-bit coordinate cannot tell neighbouring tokens apart."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def axis_positions(offset: Tensor, scale: Tensor, n: int) -> Tensor:
    """Positions of ``n`` tokens along one axis, ``offset + scale * (i + 0.5) / n``: ``[B] -> [B, n]``."""
    i = torch.arange(n, device=offset.device, dtype=offset.dtype)
    return offset[:, None] + scale[:, None] * ((i + 0.5) / n)


def token_coordinates(box: Tensor, grid: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Absolute coordinates (f, h, w) of a patch's tokens in the whole video: ``[B, 6] -> [B, N, 3]``, paper eq. 9."""
    box = box.to(coordinate_dtype(dtype))
    axes = [axis_positions(box[:, a], box[:, 3 + a], grid[a]) for a in range(3)]
    f, h, w = grid
    b = box.shape[0]
    c = torch.stack(
        (
            axes[0][:, :, None, None].expand(b, f, h, w),
            axes[1][:, None, :, None].expand(b, f, h, w),
            axes[2][:, None, None, :].expand(b, f, h, w),
        ),
        dim=-1,
    )
    return c.reshape(b, f * h * w, 3).to(dtype)


def relative_box(box: Tensor, parent: Tensor) -> Tensor:
    """``box`` in units of ``parent`` (paper eq. 8): ``[B, 6], [B, 6] -> [B, 6]``."""
    return torch.cat(((box[:, :3] - parent[:, :3]) / parent[:, 3:], box[:, 3:] / parent[:, 3:]), dim=1)


def sample_context(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None = None,
) -> Tensor:
    """Paper eq. 7: the mean over sources of 3-D ``grid_sample`` (trilinear, border): ``[B, N, D]``."""
    dtype = sources[0].dtype
    # grid_sample has no 16-bit CPU kernel in 3-D, and 16-bit weights would be a strawman.
    work = coordinate_dtype(dtype)
    total: Tensor | None = None
    for k, (source, source_box, (f, h, w)) in enumerate(zip(sources, source_boxes, source_grids)):
        if source_index is not None:
            source, source_box = source[source_index[:, k]], source_box[source_index[:, k]]
        b, _, d = source.shape
        volume = source.to(work).reshape(b, f, h, w, d).permute(0, 4, 1, 2, 3)
        where = token_coordinates(relative_box(box.to(work), source_box.to(work)), grid, work)
        where = (2 * where - 1).flip(-1).reshape(b, *grid, 3)
        sampled = F.grid_sample(volume, where, mode="bilinear", padding_mode="border", align_corners=False)
        sampled = sampled.flatten(2).transpose(1, 2)
        total = sampled if total is None else total + sampled
    if total is None:
        raise ValueError("sources: got none, expected at least one")
    return (total / len(sources)).to(dtype)


def fuse_context(
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None = None,
) -> Tensor:
    """Paper eq. 9 and its projection: ``concat[x, ctx, c] @ W.T + b``, ``W`` is ``[D, 2D+3]`` or ``[D, 2D]``."""
    parts = [x, sample_context(sources, source_boxes, box, source_grids, grid, source_index)]
    if weight.shape[1] == 2 * x.shape[2] + 3:
        parts.append(token_coordinates(box, grid, x.dtype))
    return F.linear(torch.cat(parts, dim=-1), weight, bias)


def project_sources(sources: Sequence[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    """Every source through the columns of eq. 9's projection that belong to the context: ``[B_k, N_k, D]`` each."""
    d = weight.shape[0]
    return tuple(F.linear(source, weight[:, d : 2 * d]) for source in sources)


def fuse_projected(
    x: Tensor,
    projected: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None = None,
) -> Tensor:
    """:func:`fuse_context` with sources that were projected before they are sampled."""
    d = x.shape[2]
    out = F.linear(x, weight[:, :d], bias)
    out = out + sample_context(projected, source_boxes, box, source_grids, grid, source_index)
    if weight.shape[1] == 2 * d + 3:
        out = out + F.linear(token_coordinates(box, grid, x.dtype), weight[:, 2 * d :])
    return out


def cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """``softmax(q @ k.T * scale) @ v`` with the score matrix written out: ``[B,h,M,d], [B,h,N,d] -> [B,h,M,d]``.

    Keys where ``key_mask [B, N]`` is false have weight 0; a sample without any other gives zeros.
    """
    scores = q @ k.transpose(-1, -2) * scale
    if key_mask is None:
        return torch.softmax(scores, dim=-1) @ v
    hidden = ~key_mask[:, None, None]
    # The softmax of a row without keys is NaN, and so is its gradient unless zeros come after it.
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1).masked_fill(hidden, 0.0) @ v


def extract_tiles(video: Tensor, origins: Tensor, tile_size: Sequence[int]) -> Tensor:
    """Slices, stacked: ``[B,C,F,H,W] -> [B,T,C,f,h,w]``."""
    f, h, w = tile_size
    slices = [video[:, :, i : i + f, j : j + h, k : k + w] for i, j, k in origins.tolist()]
    return torch.stack(slices, dim=1)


def average_tiles(
    tiles: Tensor, origins: Tensor, size: Sequence[int], x: Tensor | None, alpha: float, beta: float
) -> Tensor:
    """Accumulate and count with slices (MultiDiffusion): ``alpha * x + beta * mean``, ``[B,C,F,H,W]``."""
    b, _, c, f, h, w = tiles.shape
    work = coordinate_dtype(tiles.dtype)
    total = torch.zeros(b, c, *size, dtype=work, device=tiles.device)
    count = torch.zeros(1, 1, *size, dtype=work, device=tiles.device)
    for t, (i, j, k) in enumerate(origins.tolist()):
        total[:, :, i : i + f, j : j + h, k : k + w] += tiles[:, t]
        count[:, :, i : i + f, j : j + h, k : k + w] += 1
    mean = total / count * beta
    return (mean if x is None else mean + alpha * x.to(work)).to(tiles.dtype)


# Pixel edges closer than this are the same edge: offsets i / resolution are not exact in fp32, copies should be.
EDGE_SNAP = 2.0**-11


def _snap(edge: Tensor) -> Tensor:
    whole = edge.round()
    return torch.where((edge - whole).abs() < EDGE_SNAP, whole, edge)


def area_weights(offset: Tensor, scale: Tensor, n: int, resolution: int) -> Tensor:
    """The area filter of one axis as a matrix ``[B, n, resolution]``; rows sum to 1.

    Output ``i`` is the mean of the signal (constant on each pixel) over a window of ``max(scale / n, 1 / resolution)``
    centred at ``offset + scale * (i + 0.5) / n``. Downsampling is thus antialiased, upsampling is linear interpolation,
    and at scale ``n / resolution`` on whole pixels it copies. What of a window lies outside the video falls on the
    border pixel.
    """
    centre = axis_positions(offset, scale, n) * resolution
    half = (scale * resolution / n).clamp(min=1.0)[:, None] / 2
    low, high = _snap(centre - half)[..., None], _snap(centre + half)[..., None]
    edge = torch.arange(resolution, device=offset.device, dtype=offset.dtype)
    left = torch.where(edge == 0, -torch.inf, edge)
    right = torch.where(edge == resolution - 1, torch.inf, edge + 1)
    overlap = (torch.minimum(high, right) - torch.maximum(low, left)).clamp(min=0)
    return overlap / (high - low)


def sample_patches(video: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Paper eq. 6, ``downsample(crop(video; box); size)`` with an area filter: ``[B,C,F,H,W] -> [B,C,f,h,w]``.

    uint8 video gives float32 patches of the same range.
    """
    if video.dtype is torch.uint8:
        video = video.float()
    work = coordinate_dtype(video.dtype)
    box = box.to(work)
    out = video.to(work)
    for axis in range(3):
        matrix = area_weights(box[:, axis], box[:, 3 + axis], size[axis], video.shape[2 + axis])
        out = torch.einsum("bnr,bc...r->bc...n", matrix, out.movedim(2 + axis, -1)).movedim(-1, 2 + axis)
    return out.to(video.dtype)
