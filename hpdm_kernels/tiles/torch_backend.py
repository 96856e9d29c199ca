"""The portable backend of ``tiles.py``: strided views of many tiles at once, in pieces that stay in the cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpdm_kernels.reference import coordinate_dtype
from hpdm_kernels.tiles.geometry import Axis, Cells, Plan
from hpdm_kernels.tiles.huge_pages import new_empty

# The average takes as many planes (one frame of one channel) at once as have about this many elements in all tiles
# (8 MB in fp32). The last cache (32 MB on the CPU measured) then holds a piece through all of its sums, and calls are
# few: pieces of half the size took a fifth more time. On a GPU launches cost more than cache misses.
CPU_PIECE = 1 << 21
GPU_PIECE = 1 << 26


def inverse_counts(axis: Axis, like: Tensor) -> Tensor:
    """One over the number of tiles that cover each coordinate, of ``like``'s dtype and device."""
    return 1.0 / torch.tensor([max(n, 1) for n in axis.counts()], dtype=like.dtype, device=like.device)


def _pieces(axis: Axis, longest: int) -> Iterator[tuple[int, int, range]]:
    """The cells of an axis, each cut into equal pieces where it is longer than ``longest``."""
    for start, stop, cover in axis.cells():
        cuts = -(-(stop - start) // longest)
        for a, b in itertools.pairwise(start + (stop - start) * n // cuts for n in range(cuts + 1)):
            yield a, b, cover


def _sum_into(out: Tensor, parts: Sequence[Tensor]) -> None:
    """Overwrites ``out`` with the sum of ``parts``, taken in their order and in ``out``'s dtype."""
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


def extract(video: Tensor, plan: Plan, tile: Sequence[int], mean: bool, scale: float) -> Tensor:
    """One strided copy of all evenly spaced tiles; the weights, if any, are applied to the video first."""
    b, c = video.shape[:2]
    out = new_empty(video, b, len(plan.origins), c, *tile)
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
        view, some = video, grid
        for n, (axis, (first, count, step)) in enumerate(zip(plan.axes, runs)):
            view = view.narrow(2 + n, axis.origins[first], (count - 1) * step + axis.tile).unfold(
                2 + n, axis.tile, step
            )
            some = some.narrow(1 + n, first, count)
        some.copy_(view.permute(0, 2, 3, 4, 1, 5, 6, 7))
    return out


def _add_up(out: Tensor, layers: Sequence[Tensor], cells: Sequence[Cells]) -> None:
    """``out [..., size]`` becomes the sums of all ``layers [T, ..., tile]`` where they lie along the last dimension."""
    for c in cells:
        span = out.narrow(-1, c.start, (c.count - 1) * c.step + c.length).unfold(-1, c.length, c.step)
        parts = [
            tiles[c.first + p :: c.tile_step][: c.count].narrow(-1, at, c.length).movedim(0, -2)
            for tiles, (p, at) in itertools.product(layers, enumerate(c.offsets))
        ]
        _sum_into(span, parts)


def average(
    tiles: Tensor, plan: Plan, size: Sequence[int], x: Tensor | None, alpha: float, beta: float, mean: bool
) -> Tensor:
    """Adds up all tiles, some planes at a time: along frames and height at once, then along width.

    The first sum alone reads the tiles from memory, in runs of whole planes, and leaves far fewer elements to the
    second one, which has the shortest runs and writes where the result belongs. So beyond the result there are the
    first sums of a piece and a plane or two of weights.
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
    pieces = list(_pieces(axis_f, planes))
    longest = max(stop - start for start, stop, _ in pieces)
    channels = min(c, max(1, planes // longest))
    weights: dict[int, Tensor | float] = {len(cover): beta for _, _, cover in pieces}
    if mean:
        like = tiles.new_empty(0, dtype=work)
        inverse = inverse_counts(axis_h, like)[:, None] * inverse_counts(axis_w, like)
        weights = {n: inverse * (beta / n) for n in weights}
        del inverse  # before the scratch memory comes
    columns = tiles.new_empty(b, n_w, channels, longest, size[1], w, dtype=work)
    out = new_empty(tiles, b, c, *size)
    # 16-bit results are rounded once, at the end.
    sums = None if out.dtype == work else tiles.new_empty(b, channels, longest, *size[1:], dtype=work)
    alike_h, alike_w = axis_h.alike(), axis_w.alike()
    for (start, stop, cover), channel in itertools.product(pieces, range(0, c, channels)):
        n, some = stop - start, min(channels, c - channel)
        here = (slice(None), slice(channel, channel + some), slice(start, stop))
        tall, total = columns[:, :, :some, :n], out[here] if sums is None else sums[:, :some, :n]
        parts = [grid[:, i, :, :, here[1]].narrow(4, start - axis_f.origins[i], n) for i in cover]
        _add_up(tall.transpose(4, 5), [part.movedim(1, 0).transpose(5, 6) for part in parts], alike_h)
        _add_up(total, [tall.movedim(1, 0)], alike_w)
        _linear_step(out[here], total, weights[len(cover)], None if x is None else x[here], alpha)
    return out


def add(sums: Tensor, tiles: Tensor, plan: Plan, first: int) -> None:
    """Adds the tiles from number ``first`` on to ``sums``: every voxel takes its tiles one by one, in their order."""
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    if first == 0:
        sums.zero_()
    axis_w = plan.axes[2]
    done, per_row, w = 0, len(axis_w.origins), axis_w.tile
    while done < tiles.shape[1]:
        t = first + done
        at_f, at_h, _ = plan.origins[t]
        origins = axis_w.origins[t % per_row :][: tiles.shape[1] - done]
        row = sums.narrow(2, at_f, tiles.shape[3]).narrow(3, at_h, tiles.shape[4])
        chunk = tiles[:, done : done + len(origins)].permute(0, 2, 3, 4, 1, 5)
        for start, count, step in Axis(axis_w.size, w, origins).runs():
            # Overlapping tiles are a few tilings without overlap, each added in one operation: from their right ends
            # to their left ones, so that an earlier tile's right end comes before a later tile's left one.
            for at in reversed(range(0, w, step)):
                width = min(step, w - at)
                columns = row.narrow(4, origins[start] + at, (count - 1) * step + width).unfold(4, width, step)
                columns.add_(chunk.narrow(4, start, count).narrow(5, at, width))
        done += len(origins)


def step(sums: Tensor, plan: Plan, dtype: torch.dtype, x: Tensor | None, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta * sums / counts``; uses up ``sums``."""
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    axis_f, axis_h, axis_w = plan.axes
    inverse = inverse_counts(axis_h, sums)[:, None] * inverse_counts(axis_w, sums)
    out = new_empty(sums, *sums.shape, dtype=dtype)
    longest = max(1, (CPU_PIECE if sums.device.type == "cpu" else GPU_PIECE) // sums[:, :, 0].numel())
    for start, stop, cover in _pieces(axis_f, longest):
        total, weight, here = sums[:, :, start:stop], inverse * (beta / len(cover)), slice(start, stop)
        _linear_step(out[:, :, here], total, weight, None if x is None else x[:, :, here], alpha)
    return out
