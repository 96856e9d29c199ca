"""Coding frames tile by tile along height and width, for frames whose activations do not fit in memory.

Tiles overlap and are blended with weights that rise linearly over the overlap, so that no tile ends abruptly. The
result is not that of whole frames: normalization takes the statistics of a tile instead of those of a frame, and
convolutions repeat a tile's edge instead of seeing what lies beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels import TileAccumulator


class SpatialTiles(NamedTuple):
    """Size and overlap of tiles, in latents."""

    height: int
    width: int
    overlap: int

    @classmethod
    def checked(cls, tile: tuple[int, int] | None, overlap: int | None) -> SpatialTiles | None:
        """Tiles of (height, width) latents; ``None`` for no tiles.

        Args:
            tile: height and width.
            overlap: of neighboring tiles; ``None`` for a quarter of the tile's shorter side, rounded down.

        Raises:
            TypeError, ValueError: not two sizes of at least 1, or an overlap that is not below both, or one without
                tiles.
        """
        if tile is None:
            if overlap is not None:
                raise ValueError(f"overlap: got {overlap} without a tile, expected one with it")
            return None
        if not isinstance(tile, (tuple, list)) or len(tile) != 2 or not all(type(n) is int for n in tile):
            raise TypeError(f"tile: got {tile!r}, expected two ints (height, width) or None")
        height, width = tile
        if min(tile) < 1:
            raise ValueError(f"tile: got {tuple(tile)}, expected at least 1 latent on both axes")
        if overlap is None:
            overlap = min(tile) // 4
        if type(overlap) is not int:
            raise TypeError(f"overlap: got {overlap!r}, expected an int or None")
        if not 0 <= overlap < min(tile):
            raise ValueError(f"overlap: got {overlap}, expected 0 to {min(tile) - 1} for tiles of {tuple(tile)}")
        return cls(height, width, overlap)


class _Axis(NamedTuple):
    """Tiles along height or width, in latents."""

    tile: int
    origins: list[int]


def _axis(size: int, tile: int, overlap: int) -> _Axis:
    """Tiles that cover ``size`` latents; the last one is moved back to end with them."""
    tile = min(tile, size)
    return _Axis(tile, [*range(0, size - tile, max(1, tile - overlap)), size - tile])


def _ramps(tile: int, overlap: int) -> Tensor:
    """Weights of a tile's pixels: linear over the overlap at both ends, 1 between, never 0."""
    if not overlap:
        return torch.ones(tile)
    at = torch.arange(tile, dtype=torch.float32) + 0.5
    return torch.minimum(at, tile - at).div(overlap).clamp(max=1.0)


def code_in_tiles(
    code: Callable[[Tensor], Tensor],
    content: Tensor,
    tiles: SpatialTiles,
    consumed: tuple[int, int],
    produced: tuple[int, int],
) -> Tensor:
    """``code`` of all tiles of ``content``, blended. Holds the result and one tile.

    Args:
        code: encodes or decodes ``[B, C, F, h, w]``.
        content: ``[B, C, F, H, W]``, whole latents or pixels of whole latents.
        tiles: size and overlap.
        consumed: rows and columns of ``content`` per latent.
        produced: rows and columns of the result per latent.

    Returns:
        ``[B, C', F', H', W']`` with the channels and frames of ``code``'s results.
    """
    axes = [
        _axis(size // unit, tile, tiles.overlap)
        for size, unit, tile in zip(content.shape[3:], consumed, (tiles.height, tiles.width))
    ]
    (tile_h, rows), (tile_w, columns) = axes
    unit_h, unit_w = consumed
    sums: TileAccumulator | None = None
    for i in rows:
        for j in columns:
            part = content.narrow(3, i * unit_h, tile_h * unit_h).narrow(4, j * unit_w, tile_w * unit_w)
            result = code(part)
            if sums is None:
                sums = _accumulator(axes, tiles.overlap, produced, result.shape[2])
            sums.add(result[:, None])
            del result
    if sums is None:
        raise ValueError(f"content: got shape {tuple(content.shape)}, expected pixels")
    return sums.step()


def _accumulator(axes: list[_Axis], overlap: int, produced: tuple[int, int], frames: int) -> TileAccumulator:
    """Averages tiles of results with weights."""
    along = [torch.tensor(axis.origins) * unit for axis, unit in zip(axes, produced)]
    extents = [axis.tile * unit for axis, unit in zip(axes, produced)]
    size = [int(origins[-1]) + extent for origins, extent in zip(along, extents)]
    ramps = [_ramps(extent, overlap * unit) for extent, unit in zip(extents, produced)]
    origins = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *along)
    return TileAccumulator(origins, (frames, *extents), (frames, *size), weights=[torch.ones(frames), *ramps])
