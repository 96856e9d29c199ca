"""Launches the tile kernels: makes tables of origins, finds groups of aligned columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels._triton import cdiv, launch_grid
from hpdm_kernels.tiles import triton_kernels
from hpdm_kernels.tiles.block_sizes import average_blocks, extract_blocks
from hpdm_kernels.tiles.geometry import TilePlan
from hpdm_kernels.tiles.huge_pages import new_empty
from hpdm_kernels.tiles.weights import Shares


class Tables(NamedTuple):
    """What the kernels read of a plan."""

    origins: Tensor
    """``[T, 3]`` int32."""
    cover: Tensor
    """``[F + H + W / vector]`` int64, see ``triton_kernels``."""
    starts: Tensor
    """``[T_f + T_h + T_w]`` int32, origins of the grid per axis, concatenated."""


def tables(plan: TilePlan, device: torch.device, vector: int) -> Tables:
    """The tables for groups of ``vector`` columns; made once and kept by the plan.

    They are copied from ordinary host memory, which a CUDA graph cannot capture.
    """
    found = plan.tables.get((device, vector))
    if found is None:
        entries: list[list[int]] = [
            [(n.start << 32) + len(n) for start, stop, n in axis.cells() for _ in range(start, stop)]
            for axis in plan.axes or ()
        ]
        cover = [entry for axis in entries[:2] for entry in axis] + [e for axis in entries[2:] for e in axis[::vector]]
        starts = [origin for axis in plan.axes or () for origin in axis.origins]
        found = plan.tables[device, vector] = Tables(
            torch.tensor(plan.origins, dtype=torch.int32, device=device),
            torch.tensor(cover, dtype=torch.int64, device=device),
            torch.tensor(starts, dtype=torch.int32, device=device),
        )
    return found


def _vector(plan: TilePlan, tile_w: int, *tensors: Tensor) -> int:
    """Columns per group: 16 bytes of the largest dtype, or 1 if an origin, width, stride or pointer is not aligned."""
    vector = 16 // max(t.itemsize for t in tensors)
    if any(n % vector for n in (plan.common_width, tile_w, *(t.shape[-1] for t in tensors))):
        return 1
    for t in tensors:
        *outer, last = t.stride()
        if last != 1 or t.data_ptr() % 16 or any(s % vector for n, s in zip(t.shape, outer) if n > 1):
            return 1
    return vector


def extract(
    video: Tensor, plan: TilePlan, tile: Sequence[int], mean: bool, scale: float, shares: Shares | None = None
) -> Tensor:
    """``scale`` times the tiles ``[B, T, C, *tile]`` of ``video [B, C, F, H, W]``.

    ``mean``: each voxel is also divided by the number of tiles that cover it, or with ``shares`` multiplied by the
    tile's share.
    """
    b, c, f, h, _ = video.shape
    t, rows, width = len(plan.origins), c * tile[0] * tile[1], tile[2]
    out = new_empty(video, b, t, c, *tile)
    vector = _vector(plan, width, video, out)
    blocks = extract_blocks(rows, width, vector)
    n_blocks = cdiv(rows, blocks["BLOCK_R"]), cdiv(width, blocks["BLOCK_W"] * vector)
    origins, cover, _ = tables(plan, video.device, vector)
    with torch.cuda.device_of(video):
        triton_kernels.extract_tiles_kernel[launch_grid(b, t, *n_blocks)](
            video, out, origins, cover, _table(shares, out), scale, *video.stride(), t, c, f, h, *tile,
            *(plan.grid or (1, 1, t)), *n_blocks, MEAN=mean and shares is None, SHARES=shares is not None, **blocks,
        )  # fmt: skip
    return out


def _table(shares: Shares | None, unused: Tensor) -> Tensor:
    """The table of ``shares``; without them a tensor that stands for the pointer and is not read."""
    return unused if shares is None else shares.table


def _launch(
    tiles: Tensor | None,
    sums: Tensor | None,
    x: Tensor | None,
    out: Tensor,
    plan: TilePlan,
    alpha: float,
    beta: float,
    chunk: tuple[int, int],
    box: Sequence[tuple[int, int]],
    *,
    finish: bool,
    mean: bool,
    shares: Shares | None = None,
) -> None:
    """Launches the kernel of averages, whose docstring explains ``finish``, ``mean`` and ``shares``.

    Args:
        tiles: ``[B, n, C, f, h, w]``, or ``None`` to add no tiles.
        sums: ``[B, C, F, H, W]`` fp32, sums over the tiles before ``chunk``, or ``None``.
        x: ``[B, C, F, H, W]``, or ``None``.
        out: ``[B, C, F, H, W]``, written within ``box``.
        plan: the tiles, a product grid.
        alpha, beta: factors of ``x`` and of the sums.
        chunk: (start, stop) indices of the tiles.
        box: (start, stop) per axis of the voxels to compute.
    """
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    b, c, *size = out.shape
    (start_f, stop_f), (start_h, stop_h), (start_w, stop_w) = box
    vector = _vector(plan, plan.axes[2].tile, *(t for t in (tiles, sums, x, out) if t is not None))
    # Of the size of the video, not of the box: a kernel is compiled once for all chunks.
    blocks = average_blocks(size[1], size[2], vector)
    n_blocks = cdiv(stop_h - start_h, blocks["BLOCK_R"]), cdiv(stop_w - start_w, blocks["BLOCK_W"] * vector)
    frames = stop_f - start_f
    _, cover, starts = tables(plan, out.device, vector)
    with torch.cuda.device_of(out):
        triton_kernels.average_tiles_kernel[launch_grid(b, c, frames, *n_blocks)](
            *(out if t is None else t for t in (tiles, sums, x)), out, starts, cover, _table(shares, out), alpha, beta,
            *((0,) * 6 if tiles is None else tiles.stride()), *((0,) * 5 if x is None else x.stride()),
            c, *size, *(axis.tile for axis in plan.axes), *plan.grid, *plan.most, *chunk,
            start_f, start_h, start_w, frames, stop_h, stop_w, *n_blocks, ADD=tiles is not None,
            SUMS=sums is not None, FINISH=finish, MEAN=mean, SHARES=shares is not None, HAS_X=x is not None, **blocks,
        )  # fmt: skip


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
    """``alpha * x + beta * sum`` ``[B, C, *size]``, the sum over ``tiles [B, T, C, f, h, w]``, a product grid.

    ``mean``: the sum is divided by the number of tiles that cover each voxel; with ``shares`` each tile is multiplied
    by its share instead.
    """
    out = new_empty(tiles, tiles.shape[0], tiles.shape[2], *size)
    every, whole, mean = (0, len(plan.origins)), [(0, n) for n in size], mean and shares is None
    _launch(tiles, None, x, out, plan, alpha, beta, every, whole, finish=True, mean=mean, shares=shares)
    return out


def add(sums: Tensor, tiles: Tensor, plan: TilePlan, first: int, shares: Shares | None = None) -> None:
    """Adds ``tiles [B, n, C, f, h, w]``, from index ``first`` on, to ``sums [B, C, F, H, W]`` fp32, in place.

    ``sums`` need not be zeroed before the first tile. With ``shares`` each tile is multiplied by its share.
    """
    chunk = (first, first + tiles.shape[1])
    _launch(tiles, sums, None, sums, plan, 0.0, 1.0, chunk, plan.box(*chunk), finish=False, mean=False, shares=shares)


def step(
    sums: Tensor,
    plan: TilePlan,
    dtype: torch.dtype,
    x: Tensor | None,
    alpha: float,
    beta: float,
    mean: bool = True,
) -> Tensor:
    """``alpha * x + beta * sums`` ``[B, C, F, H, W]`` of ``dtype``, after the last tile.

    ``mean``: the sums are divided by the numbers of tiles.
    """
    out = new_empty(sums, *sums.shape, dtype=dtype)
    no_tiles, whole = (len(plan.origins),) * 2, [(0, n) for n in sums.shape[2:]]
    _launch(None, sums, x, out, plan, alpha, beta, no_tiles, whole, finish=True, mean=mean)
    return out
