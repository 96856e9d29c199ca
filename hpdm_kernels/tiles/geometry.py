"""Computes which tiles cover which pixels, from the tiles' origins, which are read on the host."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hpdm_kernels._checks import Triple, read_values
from hpdm_kernels._transforms import is_mapped

AXES = ("frames", "height", "width")


@dataclass(frozen=True)
class Cells:
    """Evenly spaced cells of equal length, all covered by the same number of tiles and at the same offsets within them.

    A cell is a range of coordinates between two neighboring starts or ends of tiles.
    """

    start: int
    """First coordinate of the first cell."""
    length: int
    step: int
    """Distance from the start of a cell to that of the next."""
    count: int
    """Number of cells."""
    first: int
    """The first tile that covers the first cell."""
    tile_step: int
    """Difference between the first tiles of neighboring cells."""
    offsets: tuple[int, ...]
    """First coordinate of a cell within each of the tiles that cover it, in the order of the tiles."""


@dataclass(frozen=True)
class Axis:
    """One axis of a product grid of tiles."""

    size: int
    """Size of the video along this axis."""
    tile: int
    """Size of a tile along this axis."""
    origins: tuple[int, ...]
    """First coordinates of the tiles, ascending."""

    def cells(self) -> list[tuple[int, int, range]]:
        """The axis cut wherever a tile starts or ends: ``(start, stop, indices of the tiles that cover the cell)``."""
        edges = sorted({0, self.size, *self.origins, *(o + self.tile for o in self.origins)})
        return [
            (a, b, range(sum(o + self.tile <= a for o in self.origins), sum(o <= a for o in self.origins)))
            for a, b in itertools.pairwise(edges)
        ]

    def cell_sets(self) -> list[Cells]:
        """All cells, grouped into sets that one strided view can address.

        The number of sets does not grow with the number of tiles: at 50 % overlap there are three.
        """
        kinds: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
        for start, stop, cover in self.cells():
            offsets = tuple(start - self.origins[t] for t in cover)
            kinds.setdefault((stop - start, offsets), []).append((start, cover.start))
        sets = []
        for (length, offsets), starts in kinds.items():
            at = 0
            while at < len(starts):
                (start, first), following = starts[at], starts[at + 1 : at + 2]
                step, tile_step = (following[0][0] - start, following[0][1] - first) if following else (length, 1)
                count = 1
                while starts[at + count : at + count + 1] == [(start + count * step, first + count * tile_step)]:
                    count += 1
                sets.append(Cells(start, length, step, count, first, tile_step, offsets))
                at += count
        return sets

    def runs(self) -> list[tuple[int, int, int]]:
        """Maximal runs of evenly spaced tiles: ``(first tile, number of tiles, step in pixels)``."""
        runs, first = [], 0
        while first < len(self.origins):
            last = first
            step = self.origins[first + 1] - self.origins[first] if first + 1 < len(self.origins) else self.tile
            while last + 1 < len(self.origins) and self.origins[last + 1] - self.origins[last] == step:
                last += 1
            runs.append((first, last - first + 1, step))
            first = last + 1
        return runs

    def counts(self) -> list[int]:
        """How many tiles cover each coordinate."""
        return [len(cover) for start, stop, cover in self.cells() for _ in range(start, stop)]


@dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles of a video, as read from a tensor of origins."""

    origins: tuple[tuple[int, int, int], ...]
    """First pixel (frame, row, column) of every tile."""
    axes: tuple[Axis, Axis, Axis] | None
    """The three axes if the tiles form a product grid, else ``None``."""
    obstacle: str | None
    """The reason why the tiles cannot be averaged, ``None`` if they can."""
    tables: dict[Any, Any] = field(default_factory=dict)
    """What a backend keeps on a device for these tiles; lives as long as the plan."""

    @functools.cached_property
    def common_width(self) -> int:
        """The greatest common divisor of the first columns of all tiles."""
        return math.gcd(*(k for *_, k in self.origins))

    @functools.cached_property
    def most(self) -> list[int]:
        """The largest number of tiles that cover a coordinate, for each axis of a product grid."""
        return [max(axis.counts()) for axis in self.axes or ()]

    @functools.cached_property
    def grid(self) -> list[int]:
        """Number of tiles along each axis of a product grid."""
        return [len(axis.origins) for axis in self.axes or ()]

    def place(self, t: int) -> tuple[int, int, int]:
        """Indices of tile ``t`` along the three axes of a product grid."""
        _, n_h, n_w = self.grid
        return t // (n_h * n_w), t // n_w % n_h, t % n_w

    def box(self, first: int, stop: int) -> list[tuple[int, int]]:
        """(start, stop) per axis of the smallest box around tiles ``first`` to ``stop - 1`` of a product grid.

        Raises:
            ValueError: the tiles are no product grid.
        """
        if self.axes is None:
            raise ValueError("plan: got origins that are no product grid, expected one with axes")
        low, high = self.origins[first], self.origins[stop - 1]
        # Tiles are in row-major order: after the first axis on which the two differ, the box covers whole axes.
        box, whole = [], False
        for axis, a, b in zip(self.axes, low, high):
            box.append((axis.origins[0], axis.origins[-1] + axis.tile) if whole else (a, b + axis.tile))
            whole = whole or a != b
        return box


@functools.lru_cache(maxsize=64)
def _parse(data: bytes, tile: Triple, size: Triple) -> TilePlan:
    """The plan of the origins in ``data``, int64 ``[T, 3]``; see :func:`read_origins`."""
    flat = memoryview(data).cast("q").tolist()
    origins = tuple(zip(flat[0::3], flat[1::3], flat[2::3]))
    for t, origin in enumerate(origins):
        if any(o < 0 or o + n > m for o, n, m in zip(origin, tile, size)):
            raise ValueError(
                f"origins: row {t} is {origin}, expected a tile of {tile} inside of {size}: 0 <= origin <= size - tile"
            )
    per_axis = [tuple(sorted(set(column))) for column in zip(*origins)]
    if tuple(itertools.product(*per_axis)) != origins:
        grid = " x ".join(str(len(values)) for values in per_axis)
        return TilePlan(
            origins,
            None,
            f"{len(origins)} tiles in this order are not a product grid in row-major order (there are {grid} distinct "
            "origins in frames x height x width)",
        )
    axes = tuple(Axis(m, n, values) for m, n, values in zip(size, tile, per_axis))
    for name, axis in zip(AXES, axes):
        for start, stop, cover in axis.cells():
            if not cover:
                return TilePlan(origins, axes, f"no tile covers {name} {start} to {stop - 1}")  # type: ignore[arg-type]
    return TilePlan(origins, axes, None)  # type: ignore[arg-type]


class _Read(NamedTuple):
    """What was read from a tensor of origins."""

    data: bytes
    """Its values, int64 ``[T, 3]``."""
    plans: dict[tuple[Triple, Triple], TilePlan]
    """By the sizes of a tile and of the video."""


_read: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Tensor of origins -> :class:`_Read`. A plan lives, with its tables on a GPU, at least as long as the tensors that it
was read from, whatever else is read: a captured CUDA graph goes on reading these tables."""


def read_origins(origins: Tensor, tile: Sequence[int], size: Sequence[int], cover: bool = False) -> TilePlan:
    """Reads ``origins [T, 3]`` on the host. Synchronizes if ``origins`` is on a GPU.

    The plan is kept until ``origins`` is freed, or read again with other values.

    Args:
        origins: first pixel of each tile, integers.
        tile: (frames, height, width) of a tile.
        size: (frames, height, width) of the video.
        cover: also require the tiles to form a product grid that covers the whole video.

    Raises:
        ValueError: a tile outside of the video; with ``cover`` also tiles that are no product grid or leave gaps.
    """
    if is_mapped(origins):
        raise ValueError("origins: got a tensor that torch.func.vmap maps over, expected the same origins for all")
    values = read_values(origins if origins.device.type == "cpu" else origins.cpu())
    # Comparing bytes takes a tenth of the time of hashing them.
    data, read = values.astype(np.int64, copy=False).tobytes(), _read.get(origins)
    if read is None or read.data != data:
        read = _read[origins] = _Read(data, {})
    (f, h, w), (frames, height, width) = tile, size
    sizes = (f, h, w), (frames, height, width)
    plan = read.plans.get(sizes)
    if plan is None:
        plan = read.plans[sizes] = _parse(read.data, *sizes)
    if cover and plan.obstacle:
        raise ValueError(f"origins: {plan.obstacle}, expected a product grid of tiles that covers the whole video")
    return plan
