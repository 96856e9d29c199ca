"""Context sampling at odd and real shapes."""

import pytest
import torch

from benchmarks.gpu.checks import DTYPES, check, needs_cuda
from benchmarks.shapes import T2V, T2V_1K, UCF_S, ContextShape, Pyramid
from hpdm_kernels import reference, sample_context

pytestmark = needs_cuda

SHAPES = (
    ContextShape(Pyramid("odd", (5, 28, 12), (1, 4, 4), 4, (1, 2, 2), 64, width=40), batch=3),
    ContextShape(Pyramid("single token", (1, 4, 4), (1, 4, 4), 2, (2, 2, 2), 64, width=16)),
    ContextShape(UCF_S),
    ContextShape(T2V, batch=2),
    ContextShape(T2V_1K),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("footprints", [True, False], ids=["footprints", "whole"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample_context(request, device, generator, shape, footprints, dtype):
    sources, boxes, box = shape.make(generator, device, DTYPES[dtype])
    rest = (boxes, box, shape.source_grids, shape.grid)
    bounds = shape.footprints if footprints else None
    check(
        request,
        lambda *s: sample_context(s, *rest, footprints=bounds, backend="triton"),
        lambda *s: reference.sample_context(s, *rest),
        sources,
    )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_source_index(request, device, generator, index_dtype):
    """Cached rows of the sources, chosen by sample, some of them twice and some never."""
    shape = SHAPES[0]
    sources, boxes, box = shape.make(generator, device)
    # Every sample must lie inside its source row's box, so all rows get the same box.
    boxes = tuple(b[:1].expand(5, 6).contiguous() for b in boxes)
    box = box[:1].expand(3, 6).contiguous()
    sources = tuple(torch.randn(5, shape.tokens, shape.width, device=device) for _ in sources)
    index = torch.randint(0, 5, (3, len(sources)), generator=generator).to(device, index_dtype)
    rest = (boxes, box, shape.source_grids, shape.grid)
    check(
        request,
        lambda *s: sample_context(s, *rest, source_index=index, footprints=shape.footprints, backend="triton"),
        lambda *s: reference.sample_context(s, *rest, index.long()),
        sources,
    )
