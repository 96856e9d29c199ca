"""The peers of the benchmarks: the fastest known ways to get the same results with PyTorch alone.

Peers of the context ops take the arguments of :mod:`hpdm_kernels.reference`. They include all work of a training step:
positions and weights are computed inside, since boxes change at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype, relative_box, token_coordinates, token_positions

Grids = Sequence[Sequence[int]]


def _interpolation_matrix(offset: Tensor, scale: Tensor, n: int, source: int) -> Tensor:
    """Linear interpolation with border padding along one axis as a matrix: ``[B], [B] -> [B, n, source]``."""
    u = (token_positions(offset, scale, n) * source - 0.5).clamp(0, source - 1)  # [B, n]
    return (1 - (u[..., None] - torch.arange(source, device=u.device, dtype=u.dtype)).abs()).clamp(min=0)


def separable_context(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_grids: Grids,
    grid: Sequence[int],
) -> Tensor:
    """Eq. 7 as three products with small matrices per source, one per axis: ``[B, N, D]``."""
    total: Tensor | None = None
    for source, source_box, shape in zip(sources, source_boxes, source_grids):
        work = coordinate_dtype(source.dtype)
        relative = relative_box(box.to(work), source_box.to(work))  # [B, 6]
        out = source.unflatten(1, tuple(shape))
        for axis in range(3):
            matrix = _interpolation_matrix(relative[:, axis], relative[:, 3 + axis], grid[axis], shape[axis])
            matrix = matrix.to(source.dtype)
            before, after = out.shape[1 : 1 + axis], out.shape[2 + axis :]
            matrix = matrix.reshape(-1, *[1] * len(before), *matrix.shape[1:])
            out = (matrix @ out.flatten(2 + axis)).unflatten(-1, after)
        total = out if total is None else total + out
    if total is None:
        raise ValueError("sources: got none, expected at least one")
    return total.flatten(1, 3) / len(sources)


def embedding_bag_context(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_grids: Grids,
    grid: Sequence[int],
) -> Tensor:
    """Eq. 7 as a weighted gather of eight corners per token and source, by ``F.embedding_bag``: ``[B, N, D]``."""
    total: Tensor | None = None
    for source, source_box, shape in zip(sources, source_boxes, source_grids):
        b, rows, d = source.shape
        work = coordinate_dtype(source.dtype)
        relative = relative_box(box.to(work), source_box.to(work))  # [B, 6]
        index = torch.zeros(b, 1, 1, device=source.device, dtype=torch.long)
        weight = torch.ones(b, 1, 1, device=source.device, dtype=work)
        for axis in range(3):
            n = shape[axis]
            u = (token_positions(relative[:, axis], relative[:, 3 + axis], grid[axis]) * n - 0.5).clamp(0, n - 1)
            low = u.floor().long()
            high = (low + 1).clamp(max=n - 1)
            fraction = u - low
            corners = torch.stack((low, high), dim=-1)
            parts = torch.stack((1 - fraction, fraction), dim=-1)
            index = (index[:, :, None, :, None] * n + corners[:, None, :, None, :]).flatten(3).flatten(1, 2)
            weight = (weight[:, :, None, :, None] * parts[:, None, :, None, :]).flatten(3).flatten(1, 2)
        index = (index + rows * torch.arange(b, device=source.device)[:, None, None]).flatten(0, 1)
        out = F.embedding_bag(
            index,
            source.reshape(b * rows, d),
            mode="sum",
            per_sample_weights=weight.flatten(0, 1).to(source.dtype),
        )
        total = out if total is None else total + out
    if total is None:
        raise ValueError("sources: got none, expected at least one")
    return (total / len(sources)).unflatten(0, (-1, total.shape[0] // box.shape[0]))


def fused_by(context: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Eq. 9 as written: concatenates, then projects; ``context`` samples eq. 7. Arguments as ``reference``'s."""

    def fuse(
        x: Tensor,
        sources: Sequence[Tensor],
        source_boxes: Sequence[Tensor],
        box: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source_grids: Grids,
        grid: Sequence[int],
    ) -> Tensor:
        parts = [x, context(sources, source_boxes, box, source_grids, grid)]
        if weight.shape[1] > 2 * x.shape[2]:
            parts.append(token_coordinates(box, grid, x.dtype))
        return F.linear(torch.cat(parts, dim=-1), weight, bias)

    return fuse


separable_fuse = fused_by(separable_context)
embedding_bag_fuse = fused_by(embedding_bag_context)


@functools.cache
def compiled(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compile`` of a peer for static shapes, with a limit on recompilations that no benchmark reaches."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(fn, fullgraph=True, dynamic=False)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """PyTorch's fused attention, by the backend that PyTorch selects: ``[B,h,M,d], [B,h,N,d] -> [B,h,M,d]``."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def accumulate_and_count(tiles: Tensor, origins: Tensor, size: Sequence[int], weight: Tensor | None = None) -> Tensor:
    """Adds tiles to a value map and a count map, tile by tile, as sliding-window libraries do: ``[B,C,F,H,W]``.

    ``weight [f, h, w]``: what an element of a tile counts; ``None`` for 1.
    """
    b, _, c, f, h, w = tiles.shape
    value = tiles.new_zeros(b, c, *size)
    count = tiles.new_zeros(1, 1, *size)
    for n, (i, j, k) in enumerate(origins.tolist()):
        value[:, :, i : i + f, j : j + h, k : k + w] += tiles[:, n] if weight is None else tiles[:, n] * weight
        count[:, :, i : i + f, j : j + h, k : k + w] += 1 if weight is None else weight
    return value / count


def index_add_average(tiles: Tensor, origins: Tensor, size: Sequence[int]) -> Tensor:
    """The average with one scatter, ``index_add_`` of all tiles: ``[B,C,F,H,W]``. Not deterministic on CUDA."""
    b, _, c, f, h, w = tiles.shape
    frames, height, width = size
    ranges = [torch.arange(n, device=tiles.device) for n in (f, h, w)]
    i, j, k = (origins[:, a, None].to(tiles.device) + r for a, r in enumerate(ranges))
    index = ((i[:, :, None, None] * height + j[:, None, :, None]) * width + k[:, None, None, :]).flatten()
    flat = tiles.transpose(1, 2).reshape(b * c, -1)
    value = flat.new_zeros(b * c, frames * height * width).index_add_(1, index, flat)
    count = flat.new_zeros(frames * height * width).index_add_(0, index, flat.new_ones(1).expand(index.numel()))
    return (value / count).reshape(b, c, frames, height, width)


def tiles_by_unfold(video: Tensor, tile_size: Sequence[int], step: Sequence[int]) -> Tensor:
    """All tiles of a regular grid as one strided view and one copy: ``[B,C,F,H,W] -> [B,T,C,f,h,w]``."""
    for axis in range(3):
        video = video.unfold(2 + axis, tile_size[axis], step[axis])
    return video.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(1, 3)


def crop_and_interpolate(video: Tensor, box: Tensor, size: Sequence[int]) -> Tensor:
    """Eq. 6 with slices and ``F.interpolate(mode="area")``; exact for boxes on whole pixels that divide evenly."""
    full = torch.tensor(video.shape[2:], dtype=torch.float64)
    starts = (box[:, :3].cpu().double() * full).round().long().tolist()
    lengths = (box[:, 3:].cpu().double() * full).round().long().tolist()
    crops = []
    for row, ((i, j, k), (f, h, w)) in enumerate(zip(starts, lengths)):
        crop = video[row : row + 1, :, i : i + f, j : j + h, k : k + w]
        crop = crop if crop.is_floating_point() else crop.float()
        crops.append(F.interpolate(crop, size=tuple(size), mode="area"))
    return torch.cat(crops)


def monai_average(tiles: Tensor, size: Sequence[int], overlap: Sequence[float]) -> Tensor:
    """MONAI's ``sliding_window_inference`` with a predictor that returns the given tiles: ``[B,C,F,H,W]``.

    This measures MONAI's value and count maps. It passes one window at a time, which MONAI slices without a copy, from
    a video that takes no memory.

    Raises:
        ImportError: MONAI is not installed (``pip install monai``; nothing else here needs it).
    """
    from monai.inferers import sliding_window_inference

    b, _, c = tiles.shape[:3]
    predictions = iter(tiles.unbind(1))
    video = tiles.new_zeros(()).expand(b, c, *size)
    return sliding_window_inference(
        video, tuple(tiles.shape[3:]), 1, lambda _: next(predictions), overlap=tuple(overlap), mode="constant"
    )
