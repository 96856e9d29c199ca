"""Tile extraction and averaging at odd and real shapes."""

import pytest
import torch

from benchmarks.gpu.checks import DTYPES, check, needs_cuda
from benchmarks.shapes import UCF_S, Pyramid, TilesShape
from hpdm_kernels import TileAccumulator, average_tiles, extract_tiles, reference
from hpdm_kernels.testing import assert_within_budget

pytestmark = needs_cuda

ODD = Pyramid("odd", (3, 6, 10), (1, 1, 1), 3, (1, 2, 2), 64)
SHAPES = (
    TilesShape(ODD, (False, True, True), batch=2, channels=5),
    TilesShape(ODD, (False, False, False), channels=1),
    TilesShape(UCF_S),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extract_tiles(request, device, generator, shape, dtype):
    _, video = shape.make(generator, device, DTYPES[dtype])
    origins = shape.origins()
    check(
        request,
        lambda v: extract_tiles(v, origins, shape.tile, backend="triton"),
        lambda v: reference.extract_tiles(v, origins, shape.tile),
        (video,),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_x", [True, False], ids=["with x", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_average_tiles(request, device, generator, shape, with_x, dtype):
    tiles, video = shape.make(generator, device, DTYPES[dtype])
    origins = shape.origins()
    inputs, alpha = ((tiles, video), 0.7) if with_x else ((tiles,), 0.0)
    check(
        request,
        lambda t, x=None: average_tiles(t, origins, shape.size, x=x, alpha=alpha, beta=-1.3, backend="triton"),
        lambda t, x=None: reference.average_tiles(t, origins, shape.size, x, alpha, -1.3),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tile_accumulator(device, generator, shape, dtype):
    tiles, video = shape.make(generator, device, DTYPES[dtype])
    origins = shape.origins()
    sums = TileAccumulator(origins, shape.tile, shape.size, backend="triton")

    def run(t, x, chunk=7):
        with torch.no_grad():
            for part in t.split(chunk, dim=1):
                sums.add(part)
            return sums.step(x, 0.7, -1.3)

    # Chunks do not change a bit.
    assert torch.equal(run(tiles, video), run(tiles, video, tiles.shape[1]))
    truth = reference.average_tiles(tiles.double(), origins, shape.size, video.double(), 0.7, -1.3)
    plain = reference.average_tiles(tiles, origins, shape.size, video, 0.7, -1.3)
    assert_within_budget("average", run(tiles, video), plain, truth)
