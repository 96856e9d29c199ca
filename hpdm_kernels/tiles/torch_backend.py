"""Tiles in PyTorch: strided views of many tiles at once, processed in parts that fit the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.tiles.geometry import Axis, Cells, TilePlan
from hpdm_kernels.tiles.huge_pages import new_empty
from hpdm_kernels.tiles.weights import Shares

# The average processes several planes at a time (a plane is one frame of one channel): as many as have about this many
# elements in all tiles. On a CPU they then stay in the last-level cache (8 MB in fp32), and calls are few. On a GPU
# launches cost more than cache misses.
CPU_PIECE = 1 << 21
GPU_PIECE = 1 << 26


def inverse_counts(axis: Axis, like: Tensor) -> Tensor:
    """One over the number of tiles that cover each coordinate, with the dtype and device of ``like``."""
    return 1.0 / torch.tensor([max(n, 1) for n in axis.counts()], dtype=like.dtype, device=like.device)


def _cut_cells(axis: Axis, longest: int) -> Iterator[tuple[int, int, range]]:
    """The cells of an axis; cells longer than ``longest`` are cut into parts of about equal size."""
    for start, stop, cover in axis.cells():
        cuts = -(-(stop - start) // longest)
        for a, b in itertools.pairwise(start + (stop - start) * n // cuts for n in range(cuts + 1)):
            yield a, b, cover


def _sum_into(out: Tensor, parts: Sequence[Tensor], factors: Sequence[Tensor] | None = None) -> None:
    """Overwrites ``out`` with the sum of ``parts``, each times its factor, in their order and in ``out``'s dtype."""
    if factors is not None:
        # Products are rounded before they are added, whatever the shape: another shape must not give other bits.
        torch.mul(parts[0], factors[0], out=out)
        for part, factor in zip(parts[1:], factors[1:]):
            out.add_(part * factor)
        return
    if len(parts) > 1 and parts[0].dtype == out.dtype:
        torch.add(parts[0], parts[1], out=out)
        parts = parts[2:]
    elif parts:
        out.copy_(parts[0])
        parts = parts[1:]
    else:
        out.zero_()
    for part in parts:
        out.add_(part)


def _linear_step(out: Tensor, total: Tensor, weight: Tensor | float, x: Tensor | None, alpha: float) -> None:
    """``out = alpha * x + weight * total``, in ``total``'s dtype; may overwrite ``total``."""
    if x is None:
        torch.mul(total, weight, out=out)
    else:
        torch.add(total.mul_(weight), x, alpha=alpha, out=out)


def extract(
    video: Tensor, plan: TilePlan, tile: Sequence[int], mean: bool, scale: float, shares: Shares | None = None
) -> Tensor:
    """``scale`` times the tiles ``[B, T, C, *tile]`` of ``video [B, C, F, H, W]``.

    Evenly spaced tiles are copied together, through one strided view. ``scale`` and the division are applied to the
    video before. ``mean``: each voxel is also divided by the number of tiles that cover it, or with ``shares``
    multiplied by the tile's share.
    """
    b, c = video.shape[:2]
    out = new_empty(video, b, len(plan.origins), c, *tile)
    if shares is not None:
        return _extract_shares(out, video, plan, scale, shares)
    if mean or scale != 1.0:
        video = video.to(coordinate_dtype(video.dtype)) * scale
    if plan.axes is None:
        f, h, w = tile
        for t, (i, j, k) in enumerate(plan.origins):
            out[:, t] = video[:, :, i : i + f, j : j + h, k : k + w]
        return out
    if mean:
        inverse = [inverse_counts(axis, video) for axis in plan.axes]
        video.mul_(inverse[1][:, None] * inverse[2]).mul_(inverse[0][:, None, None])
    grid = out.unflatten(1, [len(axis.origins) for axis in plan.axes])
    for runs in itertools.product(*(axis.runs() for axis in plan.axes)):
        view, tiles = video, grid
        for n, (axis, (first, count, step)) in enumerate(zip(plan.axes, runs)):
            view = view.narrow(2 + n, axis.origins[first], (count - 1) * step + axis.tile).unfold(
                2 + n, axis.tile, step
            )
            tiles = tiles.narrow(1 + n, first, count)
        # view is [B, C, T_f, T_h, T_w, f, h, w], tiles [B, T_f, T_h, T_w, C, f, h, w].
        tiles.copy_(view.permute(0, 2, 3, 4, 1, 5, 6, 7))
    return out


def _extract_shares(out: Tensor, video: Tensor, plan: TilePlan, scale: float, shares: Shares) -> Tensor:
    """Fills ``out [B, T, C, f, h, w]`` with ``scale`` times the video times the shares, one row of tiles at a time."""
    axis_f, axis_h, axis_w = plan.axes  # type: ignore[misc]
    grid = out.unflatten(1, plan.grid)
    for (n_f, i), (n_h, j) in itertools.product(enumerate(axis_f.origins), enumerate(axis_h.origins)):
        rows = video.narrow(2, i, axis_f.tile).narrow(3, j, axis_h.tile)
        plane = shares.of_rows(n_f, n_h)[:, :, None] * scale
        for first, count, step in axis_w.runs():
            view = rows.narrow(4, axis_w.origins[first], (count - 1) * step + axis_w.tile).unfold(4, axis_w.tile, step)
            factor = plane * shares.w[first : first + count, None, None]  # [n, f, h, w]
            # view is [B, C, f, h, n, w], tiles [B, n, C, f, h, w].
            tiles = grid[:, n_f, n_h, first : first + count]
            torch.mul(view.permute(0, 4, 1, 2, 3, 5), factor[:, None], out=tiles)
    return out


def _add_up(
    out: Tensor,
    layers: Sequence[Tensor],
    cells: Sequence[Cells],
    shares: Tensor | None = None,
    of_layers: Sequence[Tensor] = (),
) -> None:
    """Overwrites ``out [..., size]`` with the sums of ``layers [T, ..., tile]``, tiles along its last dimension.

    ``shares [T, tile]``: what each tile is multiplied by. ``of_layers``: for each layer what else, to be multiplied
    with shares ``[n, length]`` of ``n`` tiles.
    """
    for c in cells:
        span = out.narrow(-1, c.start, (c.count - 1) * c.step + c.length).unfold(-1, c.length, c.step)
        parts = [
            tiles[c.first + p :: c.tile_step][: c.count].narrow(-1, at, c.length).movedim(0, -2)
            for tiles, (p, at) in itertools.product(layers, enumerate(c.offsets))
        ]
        factors = None
        if shares is not None:
            of_cells = [
                shares[c.first + p :: c.tile_step][: c.count].narrow(-1, at, c.length) for p, at in enumerate(c.offsets)
            ]
            factors = [layer * cell for layer, cell in itertools.product(of_layers, of_cells)] or of_cells
        _sum_into(span, parts, factors)


def average(
    tiles: Tensor,
    plan: TilePlan,
    size: Sequence[int],
    x: Tensor | None,
    alpha: float,
    beta: float,
    mean: bool,
    shares: Shares | None = None,
) -> Tensor:
    """``alpha * x + beta * sum`` ``[B, C, *size]``, the sum over ``tiles [B, T, C, f, h, w]``.

    ``mean``: the sum is divided by the number of tiles that cover each voxel; with ``shares``, which need a product
    grid, each tile is multiplied by its share instead.

    A few planes are processed at a time. Tiles are summed over frames and height together, then over width. Only the
    first sum reads the tiles from memory, in whole planes. It leaves far fewer elements to the second sum, which reads
    short runs and writes the result. The memory beyond the result is the first sums of a few planes, and one or two
    planes of weights.
    """
    b, _, c, f, h, w = tiles.shape
    work = coordinate_dtype(tiles.dtype)
    if plan.axes is None:
        total = tiles.new_zeros(b, c, *size, dtype=work)
        for t, (i, j, k) in enumerate(plan.origins):
            total[:, :, i : i + f, j : j + h, k : k + w] += tiles[:, t]
        total *= beta
        return (total if x is None else total.add_(x, alpha=alpha)).to(tiles.dtype)
    axis_f, axis_h, axis_w = plan.axes
    grid = tiles.unflatten(1, [len(axis.origins) for axis in plan.axes])
    n_w, per_plane = len(axis_w.origins), b * grid.shape[2] * grid.shape[3] * h * w
    planes = max(1, (CPU_PIECE if tiles.device.type == "cpu" else GPU_PIECE) // per_plane)
    cells_f = list(_cut_cells(axis_f, planes))
    longest = max(stop - start for start, stop, _ in cells_f)
    channels = min(c, max(1, planes // longest))
    weights: dict[int, Tensor | float] = {len(cover): beta for _, _, cover in cells_f}
    if mean and shares is None:
        like = tiles.new_empty(0, dtype=work)
        inverse = inverse_counts(axis_h, like)[:, None] * inverse_counts(axis_w, like)
        weights = {n: inverse * (beta / n) for n in weights}
        del inverse  # before the buffers below are allocated
    columns = tiles.new_empty(b, n_w, channels, longest, size[1], w, dtype=work)
    out = new_empty(tiles, b, c, *size)
    # 16-bit results are rounded once, at the end.
    sums = None if out.dtype == work else tiles.new_empty(b, channels, longest, *size[1:], dtype=work)
    sets_h, sets_w = axis_h.cell_sets(), axis_w.cell_sets()
    for (start, stop, cover), channel in itertools.product(cells_f, range(0, c, channels)):
        n, n_channels = stop - start, min(channels, c - channel)
        block = (slice(None), slice(channel, channel + n_channels), slice(start, stop))
        tall = columns[:, :, :n_channels, :n]  # [B, T_w, channels, n, H, w]
        total = out[block] if sums is None else sums[:, :n_channels, :n]  # [B, channels, n, H, W]
        # The parts of the tiles that cover these frames, [B, T_h, T_w, channels, n, h, w] each.
        layers = [grid[:, i, :, :, block[1]].narrow(4, start - axis_f.origins[i], n) for i in cover]
        layers = [layer.movedim(1, 0).transpose(5, 6) for layer in layers]  # [T_h, B, T_w, channels, n, w, h]
        if shares is None:
            _add_up(tall.transpose(4, 5), layers, sets_h)
            _add_up(total, [tall.movedim(1, 0)], sets_w)
        else:
            of_frames = [shares.f[i].narrow(0, start - axis_f.origins[i], n)[:, None, None, None] for i in cover]
            _add_up(tall.transpose(4, 5), layers, sets_h, shares.h, of_frames)
            _add_up(total, [tall.movedim(1, 0)], sets_w, shares.w)
        _linear_step(out[block], total, weights[len(cover)], None if x is None else x[block], alpha)
    return out


def add(sums: Tensor, tiles: Tensor, plan: TilePlan, first: int, shares: Shares | None = None) -> None:
    """Adds ``tiles [B, n, C, f, h, w]``, from index ``first`` on, to ``sums [B, C, F, H, W]``, in place.

    Every voxel adds its tiles one by one, in their order, each times its share if there are ``shares``. The first tile
    zeroes ``sums``.
    """
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    if first == 0:
        sums.zero_()
    axis_w = plan.axes[2]
    added, per_row, w = 0, len(axis_w.origins), axis_w.tile
    while added < tiles.shape[1]:
        t = first + added
        at_f, at_h, _ = plan.origins[t]
        origins = axis_w.origins[t % per_row :][: tiles.shape[1] - added]
        row = sums.narrow(2, at_f, tiles.shape[3]).narrow(3, at_h, tiles.shape[4])
        chunk = tiles[:, added : added + len(origins)].permute(0, 2, 3, 4, 1, 5)
        if shares is not None:
            n_f, n_h, n_w = plan.place(t)
            chunk = chunk * (shares.of_rows(n_f, n_h)[:, :, None, None] * shares.w[n_w : n_w + len(origins)])
        for start, count, step in Axis(axis_w.size, w, origins).runs():
            # Tiles are cut into columns of width `step`. A column does not overlap the same column of other tiles, so
            # one operation can add it for all tiles. The rightmost column comes first: where two tiles overlap, the
            # earlier tile has its column further right, so tiles are added in their order.
            for at in reversed(range(0, w, step)):
                width = min(step, w - at)
                columns = row.narrow(4, origins[start] + at, (count - 1) * step + width).unfold(4, width, step)
                columns.add_(chunk.narrow(4, start, count).narrow(5, at, width))
        added += len(origins)


def step(
    sums: Tensor,
    plan: TilePlan,
    dtype: torch.dtype,
    x: Tensor | None,
    alpha: float,
    beta: float,
    mean: bool = True,
) -> Tensor:
    """``alpha * x + beta * sums`` ``[B, C, F, H, W]`` of ``dtype``; overwrites ``sums``.

    ``mean``: the sums are divided by the numbers of tiles.
    """
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    axis_f, axis_h, axis_w = plan.axes
    inverse = inverse_counts(axis_h, sums)[:, None] * inverse_counts(axis_w, sums) if mean else None
    out = new_empty(sums, *sums.shape, dtype=dtype)
    longest = max(1, (CPU_PIECE if sums.device.type == "cpu" else GPU_PIECE) // sums[:, :, 0].numel())
    for start, stop, cover in _cut_cells(axis_f, longest):
        total, frames = sums[:, :, start:stop], slice(start, stop)
        weight = beta if inverse is None else inverse * (beta / len(cover))
        _linear_step(out[:, :, frames], total, weight, None if x is None else x[:, :, frames], alpha)
    return out
