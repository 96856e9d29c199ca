"""Tile extraction and averaging at odd and real shapes."""

import pytest

from benchmarks.gpu.checks import DTYPES, check, needs_cuda
from benchmarks.shapes import UCF_S, Pyramid, TilesShape
from hpdm_kernels import average_tiles, extract_tiles, reference

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
