"""Random configurations of the ops on videos: patches and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import hpdm_kernels
from hpdm_kernels.testing import formulas
from hpdm_kernels.testing.case import Arguments, Case
from hpdm_kernels.testing.draw import Draw


def _copied(draw: Draw, size: Sequence[int], resolution: Sequence[int], rows: int) -> Tensor:
    """Boxes of ``size`` pixels on whole pixels of the video: patches are copies."""
    offsets = [[draw.random.randint(0, m - n) / m for n, m in zip(size, resolution)] for _ in range(rows)]
    scales = [n / m for n, m in zip(size, resolution)]
    return torch.tensor([row + scales for row in offsets], dtype=torch.float32)


def _is_decided(box: Tensor, size: Sequence[int], resolution: Sequence[int]) -> bool:
    """Whether rounding cannot tell which edges of windows are snapped to whole pixels."""
    edges = [formulas.window_edges(box, a, size[a], resolution[a]).flatten() for a in range(3)]
    distances = [(e - e.round()).abs() - formulas.SNAP for e in edges]
    return all(d.abs().min().item() > 2e-5 for d in distances)


def sample_patches(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.sample_patches`, of fp32 or uint8 where ``dtype`` is fp32."""
    if dtype is torch.float32 and draw.chance(0.3):
        dtype = torch.uint8
    batch = draw.size(3)
    resolution = (draw.size(8), draw.size(24), draw.size(24))
    while True:
        size = draw.triple(9)
        if draw.chance(0.2):
            size = (min(size[0], resolution[0]), min(size[1], resolution[1]), min(size[2], resolution[2]))
            box = _copied(draw, size, resolution, batch)
        else:
            box = draw.boxes(batch, overshoot=True)
        if _is_decided(box, size, resolution):
            break
    if draw.chance(0.3):
        box = box.t().contiguous().t()
    video = draw.normal(batch, draw.size(3), *resolution, dtype=dtype)
    arguments = {"video": video, "box": box, "size": size}
    names = () if dtype is torch.uint8 else ("video",)
    # Edges are rounded at the resolution's magnitude.
    return Case(hpdm_kernels.sample_patches, formulas.sample_patches, arguments, names, 4.0, 256.0)


def extract_tiles(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.extract_tiles`: a product grid, or tiles anywhere in any order."""
    origins, tile, size = draw.product_grid()
    if draw.chance(0.5):
        rows = [[draw.random.randint(0, m - n) for n, m in zip(tile, size)] for _ in range(draw.size(5))]
        origins = torch.tensor(rows, dtype=origins.dtype)
    video = draw.normal(draw.size(3), draw.size(3), *size, dtype=dtype)
    arguments = {"video": video, "origins": draw.view(origins), "tile_size": tile}
    return Case(hpdm_kernels.extract_tiles, formulas.extract_tiles, arguments, ("video",), 4.0, 8.0)


def _average(draw: Draw, dtype: torch.dtype) -> Arguments:
    origins, tile, size = draw.product_grid()
    batch, channels = draw.size(3), draw.size(3)
    arguments: Arguments = {
        "tiles": draw.normal(batch, len(origins), channels, *tile, dtype=dtype),
        "origins": draw.view(origins),
        "size": size,
        "beta": draw.choose((1.0, 0.0, -0.7, 2, draw.random.gauss(0, 1))),
        "x": None,
    }
    if draw.chance(0.6):
        arguments["x"] = draw.normal(batch, channels, *size, dtype=dtype)
        arguments["alpha"] = draw.choose((0.0, 1.0, -1.5, draw.random.gauss(0, 1)))
    if draw.chance(0.5):
        arguments["weights"] = tuple(draw.weights(n) for n in tile)
    return arguments


def average_tiles(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.average_tiles`."""
    arguments = _average(draw, dtype)
    return Case(hpdm_kernels.average_tiles, formulas.average_tiles, arguments, ("tiles", "x"), 4.0, 16.0)


def tile_accumulator(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :class:`hpdm_kernels.TileAccumulator`: two steps in chunks of any size, after a reset."""
    arguments = _average(draw, dtype)
    arguments["tile_size"] = arguments["tiles"].shape[3:]
    count = len(arguments["origins"])
    cuts = sorted(draw.random.sample(range(1, count), draw.random.randint(0, count - 1))) if count > 1 else []
    chunks = list(zip([0, *cuts], [*cuts, count]))

    def accumulate(
        tiles: Any, origins: Any, tile_size: Any, size: Any, x: Any = None, weights: Any = None,
        backend: str = "auto", **factors: Any,
    ) -> Any:  # fmt: skip
        sums = hpdm_kernels.TileAccumulator(origins, tile_size, size, weights=weights, backend=backend)
        if not isinstance(tiles, Tensor):
            sums.add(tiles)  # which refuses it
        sums.add(tiles[:, : chunks[0][1]])
        sums.reset()
        outputs = []
        for _ in range(2):
            for first, stop in chunks:
                sums.add(tiles[:, first:stop], first)
            outputs.append(sums.step(x, **factors))
        return tuple(outputs)

    def formula(**same: Any) -> tuple[Tensor, Tensor]:
        average = formulas.average_tiles(**same)
        return average, average

    return Case(accumulate, formula, arguments, (), 4.0, 16.0)
