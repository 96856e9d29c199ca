"""Fusion of context into tokens at odd and real shapes, every arithmetic."""

import pytest
import torch

from benchmarks.gpu.checks import ARITHMETIC, check, needs_cuda
from benchmarks.gpu.test_context import SHAPES
from hpdm_kernels import fuse_context, reference

pytestmark = needs_cuda


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("coordinates", [True, False], ids=["coordinates", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fuse_context(request, device, generator, shape, coordinates, arithmetic):
    dtype, precision, factor = ARITHMETIC[arithmetic]
    sources, boxes, box = shape.make(generator, device, dtype)
    d = shape.width
    x = torch.randn(shape.batch, shape.tokens, d, device=device).to(dtype)
    weight = (torch.randn(d, 2 * d + 3 * coordinates, device=device) / (2 * d) ** 0.5).to(dtype)
    bias = torch.randn(d, device=device).to(dtype)
    rest = (shape.source_grids, shape.grid)
    check(
        request,
        lambda x, w, b, *s: fuse_context(
            x, s, boxes, box, w, b, *rest, footprints=shape.footprints, precision=precision, backend="triton"
        ),
        lambda x, w, b, *s: reference.fuse_context(x, s, boxes, box, w, b, *rest),
        (x, weight, bias, *sources),
        factor=factor,
        tf32=precision == "tf32",
    )
