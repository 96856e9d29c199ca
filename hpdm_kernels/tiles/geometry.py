"""Origins of tiles, read once on the host: which tiles cover which pixels of each axis."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = ("frames", "height", "width")


@dataclass(frozen=True)
class Cells:
    """Evenly spaced cells of one length, each covered by the same parts of as many tiles."""

    start: int
    length: int
    step: int
    count: int
    first: int
    """The first tile that covers the first cell."""
    tile_step: int
    """Tiles from one cell's first tile to the next one's."""
    offsets: tuple[int, ...]
    """Where the cell begins inside of each of its tiles, in the order of the tiles."""


@dataclass(frozen=True)
class Axis:
    """One axis of a product grid of tiles."""

    size: int
    tile: int
    origins: tuple[int, ...]

    def cells(self) -> list[tuple[int, int, range]]:
        """The axis cut where a tile starts or ends: ``(start, stop, indices of the tiles that cover it)``."""
        edges = sorted({0, self.size, *self.origins, *(o + self.tile for o in self.origins)})
        return [
            (a, b, range(sum(o + self.tile <= a for o in self.origins), sum(o <= a for o in self.origins)))
            for a, b in itertools.pairwise(edges)
        ]

    def alike(self) -> list[Cells]:
        """All cells, those together that one strided view can name: three sets at 50 % overlap, however many tiles."""
        kinds: dict[tuple[int, tuple[int, ...]], list[tuple[int, int]]] = {}
        for start, stop, cover in self.cells():
            offsets = tuple(start - self.origins[t] for t in cover)
            kinds.setdefault((stop - start, offsets), []).append((start, cover.start))
        sets = []
        for (length, offsets), places in kinds.items():
            at = 0
            while at < len(places):
                (start, first), following = places[at], places[at + 1 : at + 2]
                step, tile_step = (following[0][0] - start, following[0][1] - first) if following else (length, 1)
                count = 1
                while places[at + count : at + count + 1] == [(start + count * step, first + count * tile_step)]:
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
class Plan:
    """Origins, read once: every tile's origin, and the axes where they form a product grid (else why not)."""

    origins: tuple[tuple[int, int, int], ...]
    axes: tuple[Axis, Axis, Axis] | None
    obstacle: str | None

    def box(self, first: int, stop: int) -> list[tuple[int, int]]:
        """(start, stop) per axis of the least box around tiles ``first`` to ``stop - 1`` of a product grid."""
        if self.axes is None:
            raise ValueError("plan: got origins that are no product grid, expected one with axes")
        low, high = self.origins[first], self.origins[stop - 1]
        box, whole = [], False
        for axis, a, b in zip(self.axes, low, high):
            box.append((axis.origins[0], axis.origins[-1] + axis.tile) if whole else (a, b + axis.tile))
            whole = whole or a != b
        return box


@functools.lru_cache(maxsize=64)
def _parse(data: bytes, tile: tuple[int, int, int], size: tuple[int, int, int]) -> Plan:
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
        return Plan(
            origins,
            None,
            f"{len(origins)} tiles in this order are not a product grid in row-major order (there are {grid} distinct "
            "origins in frames x height x width)",
        )
    axes = tuple(Axis(m, n, values) for m, n, values in zip(size, tile, per_axis))
    for name, axis in zip(AXES, axes):
        for start, stop, cover in axis.cells():
            if not cover:
                return Plan(origins, axes, f"no tile covers {name} {start} to {stop - 1}")  # type: ignore[arg-type]
    return Plan(origins, axes, None)  # type: ignore[arg-type]


def read_origins(origins: Tensor, tile: Sequence[int], size: Sequence[int], cover: bool = False) -> Plan:
    """Reads ``origins`` (on the host: no wait unless they are on a GPU), from a cache when they were seen before.

    Raises:
        ValueError: a tile outside of the video; with ``cover`` also tiles that are no product grid or leave gaps.
    """
    data = origins.detach().to("cpu", torch.int64).contiguous().numpy().tobytes()
    plan = _parse(data, tuple(map(int, tile)), tuple(map(int, size)))
    if cover and plan.obstacle:
        raise ValueError(f"origins: {plan.obstacle}, expected a product grid of tiles that covers the whole video")
    return plan
