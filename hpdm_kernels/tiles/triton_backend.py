"""Launches the tile kernels: computes tables of origins, block sizes, and groups of aligned columns."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._triton import INTERPRETED, launch_grid, triton
from hpdm_kernels.tiles import triton_kernels
from hpdm_kernels.tiles.geometry import TilePlan
from hpdm_kernels.tiles.huge_pages import new_empty


@functools.lru_cache(maxsize=64)
def _tables(plan: TilePlan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels' int32 tables on ``device``.

    Returns:
        Origins ``[T, 3]``; first covering tile and number of covering tiles of each coordinate, ``[F + H + W, 2]``;
        origins of the grid per axis, concatenated, ``[T_f + T_h + T_w]``.
    """
    cover = [(n.start, len(n)) for axis in plan.axes or () for a, b, n in axis.cells() for _ in range(a, b)]
    starts = [origin for axis in plan.axes or () for origin in axis.origins]
    return tuple(torch.tensor(rows, dtype=torch.int32, device=device) for rows in (plan.origins, cover, starts))  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _common_width(plan: TilePlan) -> int:
    """The greatest common divisor of the first columns of all tiles."""
    return math.gcd(*(k for *_, k in plan.origins))


def _vector(plan: TilePlan, tile_w: int, *tensors: Tensor) -> int:
    """Columns per group: 16 bytes of the smallest dtype, or 1 if an origin, width, stride or pointer is not aligned."""
    vector = 16 // min(t.element_size() for t in tensors)
    aligned = _common_width(plan) % vector == 0 and tile_w % vector == 0
    for t in tensors:
        outer = [stride for n, stride in zip(t.shape[:-1], t.stride()) if n > 1]
        aligned = aligned and t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(n % vector == 0 for n in outer)
    return vector if aligned else 1


def gpu_block(vector: int) -> tuple[int, int]:
    """Rows and columns of one frame per program on a GPU.

    More rows spill registers: single columns on sm_90, groups of eight columns on sm_90 and sm_100.
    """
    return (4 if vector > 1 else 2), 128


def _blocks(height: int, width: int, vector: int) -> dict[str, int]:
    """Divides a frame of this size into blocks, which are never much larger than the frame."""
    # The interpreter's cost is per program and operation, not per pixel.
    most_h, most_w = (256, 256) if INTERPRETED else gpu_block(vector)
    block_h = min(most_h, triton.next_power_of_2(height))
    block_w = min(most_w, triton.next_power_of_2(width)) // vector
    return {
        "n_blocks_h": triton.cdiv(height, block_h),
        "n_blocks_w": triton.cdiv(width, block_w * vector),
        "VECTOR": vector,
        "BLOCK_H": block_h,
        "BLOCK_W": block_w,
    }


def extract(video: Tensor, plan: TilePlan, tile: Sequence[int], mean: bool, scale: float) -> Tensor:
    """``scale`` times the tiles ``[B, T, C, *tile]`` of ``video [B, C, F, H, W]``.

    ``mean``: each voxel is also divided by the number of tiles that cover it.
    """
    b, c, f, h, _ = video.shape
    t = len(plan.origins)
    out = new_empty(video, b, t, c, *tile)
    blocks = _blocks(tile[1], tile[2], _vector(plan, tile[2], video, out))
    grid = launch_grid(b, t, c, tile[0], blocks["n_blocks_h"], blocks["n_blocks_w"])
    origins, cover, _ = _tables(plan, video.device)
    with torch.cuda.device_of(video):
        triton_kernels.extract_tiles_kernel[grid](
            video, out, origins, cover, scale, *video.stride(), t, c, f, h, *tile, MEAN=mean, **blocks
        )
    return out


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
) -> None:
    """Launches the kernel of averages, whose docstring explains ``finish`` and ``mean``.

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
    b, c = out.shape[:2]
    start, stop = zip(*box)
    vector = _vector(plan, plan.axes[2].tile, *(t for t in (tiles, sums, x, out) if t is not None))
    blocks = _blocks(stop[1] - start[1], stop[2] - start[2], vector)
    frames = stop[0] - start[0]
    _, cover, starts = _tables(plan, out.device)
    tile_grid = [len(axis.origins) for axis in plan.axes]
    most = [max(axis.counts()) for axis in plan.axes]
    with torch.cuda.device_of(out):
        triton_kernels.average_tiles_kernel[launch_grid(b, c, frames, blocks["n_blocks_h"], blocks["n_blocks_w"])](
            *(out if t is None else t for t in (tiles, sums, x)), out, starts, cover, alpha, beta,
            *((0,) * 6 if tiles is None else tiles.stride()), *((0,) * 5 if x is None else x.stride()),
            c, *out.shape[2:], *tile_grid, *most, *chunk, *start, frames, *stop[1:],
            ADD=tiles is not None, SUMS=sums is not None, FINISH=finish, MEAN=mean, HAS_X=x is not None, **blocks,
        )  # fmt: skip


def average(
    tiles: Tensor, plan: TilePlan, size: Sequence[int], x: Tensor | None, alpha: float, beta: float, mean: bool
) -> Tensor:
    """``alpha * x + beta * sum`` ``[B, C, *size]``, the sum over ``tiles [B, T, C, f, h, w]``, a product grid.

    ``mean``: the sum is divided by the number of tiles that cover each voxel.
    """
    out = new_empty(tiles, tiles.shape[0], tiles.shape[2], *size)
    whole = [(0, n) for n in size]
    _launch(tiles, None, x, out, plan, alpha, beta, (0, len(plan.origins)), whole, finish=True, mean=mean)
    return out


def add(sums: Tensor, tiles: Tensor, plan: TilePlan, first: int) -> None:
    """Adds ``tiles [B, n, C, f, h, w]``, from index ``first`` on, to ``sums [B, C, F, H, W]`` fp32, in place.

    ``sums`` need not be zeroed before the first tile.
    """
    chunk = (first, first + tiles.shape[1])
    _launch(tiles, sums, None, sums, plan, 0.0, 1.0, chunk, plan.box(*chunk), finish=False, mean=False)


def step(sums: Tensor, plan: TilePlan, dtype: torch.dtype, x: Tensor | None, alpha: float, beta: float) -> Tensor:
    """``alpha * x + beta * sums / counts`` ``[B, C, F, H, W]`` of ``dtype``, after the last tile."""
    out = new_empty(sums, *sums.shape, dtype=dtype)
    no_tiles, whole = (len(plan.origins),) * 2, [(0, n) for n in sums.shape[2:]]
    _launch(None, sums, x, out, plan, alpha, beta, no_tiles, whole, finish=True, mean=True)
    return out
