"""Tilings of a level's video by overlapping tiles, for sampling (paper section 4.4), and the ancestors of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdm.checks import Triple
from hpdm.patch.config import HPDMConfig
from hpdm.sampling import AXES, SamplerOptions, parse_overlap


@dataclass(frozen=True)
class Tiling:
    """A cover of one level's video by patches, evenly spaced on every axis."""

    patch: Triple
    """Size of a tile in pixels."""
    size: Triple
    """Resolution of the video that is covered, R_l."""
    stride: Triple
    """Pixels between neighboring tiles: ``patch`` without overlap, ``patch / 2`` with 50 % overlap, or less."""

    @property
    def counts(self) -> Triple:
        """Tiles per axis, ``2R/r - 1`` at 50 % overlap."""
        f, h, w = ((n - r) // s + 1 for n, r, s in zip(self.size, self.patch, self.stride))
        return (f, h, w)

    @property
    def tiles(self) -> int:
        """Number of tiles T."""
        f, h, w = self.counts
        return f * h * w

    @property
    def origins(self) -> Tensor:
        """First voxel of every tile, ``[T, 3]`` int64 in row-major order."""
        axes = [range(0, n * s, s) for n, s in zip(self.counts, self.stride)]
        return torch.tensor(list(itertools.product(*axes)), dtype=torch.int64)

    @property
    def boxes(self) -> Tensor:
        """Boxes of the tiles, ``[T, 6]`` float32."""
        size = torch.tensor(self.size, dtype=torch.float64)
        offset = self.origins / size  # [T, 3]
        scale = (torch.tensor(self.patch, dtype=torch.float64) / size).expand_as(offset)
        return torch.cat((offset, scale), dim=1).float()

    def containing(self, boxes: Tensor) -> Tensor:
        """For each box the tile that contains it and whose center is nearest to its own: ``[n, 6] -> [n]`` int64.

        Raises:
            ValueError: no tile contains one of the boxes, as can happen without overlap.
        """
        size, patch, stride, counts = (
            torch.tensor(v, dtype=torch.float64) for v in (self.size, self.patch, self.stride, self.counts)
        )
        low = boxes[:, :3].double() * size  # [n, 3], pixels
        high = low + boxes[:, 3:].double() * size
        centered = torch.round(((low + high) / 2 - patch / 2) / stride)
        index = torch.minimum(torch.maximum(centered, torch.zeros_like(centered)), counts - 1)
        contained = (index * stride <= low + 1e-3) & (index * stride + patch >= high - 1e-3)
        if not bool(contained.all()):
            row = int((~contained.all(dim=1)).nonzero()[0])
            raise ValueError(
                f"boxes: no tile contains row {row}, {boxes[row].tolist()}; overlap the tiles on that axis"
            )
        f, h, w = index.long().unbind(1)
        return (f * self.counts[1] + h) * self.counts[2] + w


def level_tiling(config: HPDMConfig, options: SamplerOptions, level: int) -> Tiling:
    """The tiling of one level. Level 0 is a single tile, and so is every axis of ratio 1.

    Args:
        config: gives the pyramid.
        options: gives the axes on which tiles overlap, and by how much.
        level: pyramid level l.

    Raises:
        ValueError: overlap on an axis whose patch size is no multiple of ``options.tiles_per_patch``.
    """
    overlap, per_patch = parse_overlap(options.overlap), options.tiles_per_patch
    stride = []
    for axis, (r, ratio, on) in enumerate(zip(config.patch, config.ratio, overlap)):
        overlaps = on and ratio > 1 and level > 0
        if overlaps and r % per_patch:
            raise ValueError(
                f"overlap: got axis {AXES[axis]!r} with patch size {r}, expected a multiple of {per_patch}, "
                "the tiles per patch"
            )
        stride.append(r // per_patch if overlaps else r)
    f, h, w = stride
    return Tiling(config.patch, config.level_resolution(level), (f, h, w))


def find_ancestors(tilings: Sequence[Tiling]) -> list[list[Tensor]]:
    """``ancestors[level][below]``: the tile of the level ``below`` that contains each tile of ``level``, ``[T]``.

    Raises:
        ValueError: a tile that no tile of a level below contains.
    """
    return [[below.containing(cover.boxes) for below in tilings[:n]] for n, cover in enumerate(tilings)]


def lineage(ancestors: Sequence[Sequence[Tensor]], level: int, batch: slice) -> list[Tensor]:
    """For each level below, the tiles that a batch depends on: its ancestors and theirs, sorted, without repeats.

    Args:
        ancestors: from :func:`find_ancestors`.
        level: level of the batch.
        batch: a range of that level's tiles.
    """
    needed = [tiles[batch] for tiles in ancestors[level]]
    for k in reversed(range(level)):
        needed[k] = needed[k].unique()
        for j in range(k):
            needed[j] = torch.cat((needed[j], ancestors[k][j][needed[k]]))
    return needed
