"""Checks tile extraction and averaging at odd and real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cases import DTYPES, Case, against_formula
from benchmarks.shapes import UCF_S, Pyramid, TilesShape
from hpdm_kernels import TileAccumulator, average_tiles, extract_tiles, reference
from hpdm_kernels.testing import Comparison, assert_within_budget

ODD = Pyramid("odd", (3, 6, 10), (1, 1, 1), 3, (1, 2, 2), 64)
SHAPES = (
    TilesShape(ODD, (False, True, True), batch=2, channels=5),
    TilesShape(ODD, (False, False, False), channels=1),
    TilesShape(UCF_S),
)


def extracted(shape: TilesShape, dtype: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``extract_tiles`` against slices of the video."""
    _, video = shape.make(generator, device, DTYPES[dtype])
    origins = shape.origins()
    return against_formula(
        lambda v: extract_tiles(v, origins, shape.tile, backend="triton"),
        lambda v: reference.extract_tiles(v, origins, shape.tile),
        [video],
    )


def averaged(
    shape: TilesShape, with_x: bool, dtype: str, device: torch.device, generator: torch.Generator
) -> Comparison:
    """``average_tiles``: the scaled mean, alone or in a sampler's step ``alpha * x + beta * mean``."""
    tiles, video = shape.make(generator, device, DTYPES[dtype])
    origins, alpha = shape.origins(), 0.7 if with_x else 0.0
    return against_formula(
        lambda t, x=None: average_tiles(t, origins, shape.size, x=x, alpha=alpha, beta=-1.3, backend="triton"),
        lambda t, x=None: reference.average_tiles(t, origins, shape.size, x, alpha, -1.3),
        (tiles, video) if with_x else (tiles,),
    )


def weighted(shape: TilesShape, dtype: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``average_tiles`` with weights per axis in a sampler's step."""
    tiles, video = shape.make(generator, device, DTYPES[dtype])
    origins, weights = shape.origins(), [torch.rand(n, generator=generator) + 0.1 for n in shape.tile]
    return against_formula(
        lambda t, x: average_tiles(
            t, origins, shape.size, x=x, alpha=0.7, beta=-1.3, weights=weights, backend="triton"
        ),
        lambda t, x: reference.average_tiles(t, origins, shape.size, x, 0.7, -1.3, weights),
        (tiles, video),
    )


def accumulated(shape: TilesShape, dtype: str, device: torch.device, generator: torch.Generator) -> None:
    """``TileAccumulator`` gives the same bits for any size of chunks, and errors within the budget."""
    tiles, video = shape.make(generator, device, DTYPES[dtype])
    origins = shape.origins()
    sums = TileAccumulator(origins, shape.tile, shape.size, backend="triton")

    def run(tiles_at_once: int) -> Tensor:
        with torch.no_grad():
            for chunk in tiles.split(tiles_at_once, dim=1):
                sums.add(chunk)
            return sums.step(video, 0.7, -1.3)

    assert torch.equal(run(7), run(tiles.shape[1]))
    oracle = reference.average_tiles(tiles.double(), origins, shape.size, video.double(), 0.7, -1.3)
    plain = reference.average_tiles(tiles, origins, shape.size, video, 0.7, -1.3)
    assert_within_budget("average", run(7), plain, oracle)


def cases() -> Iterator[Case]:
    """All cases."""
    for shape in SHAPES:
        for dtype in DTYPES:
            yield Case(f"extract_tiles[{shape}-{dtype}]", partial(extracted, shape, dtype))
            for name, with_x in (("with x", True), ("mean", False)):
                yield Case(f"average_tiles[{shape}-{name}-{dtype}]", partial(averaged, shape, with_x, dtype))
            yield Case(f"average_tiles[{shape}-weights-{dtype}]", partial(weighted, shape, dtype))
            yield Case(f"tile_accumulator[{shape}-{dtype}]", partial(accumulated, shape, dtype))
