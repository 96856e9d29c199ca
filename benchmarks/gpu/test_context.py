"""Context sampling at odd and real shapes."""

import math

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


@pytest.mark.parametrize("rows", [600, 3000])
def test_large_cache(device, rows):
    """The last row of a cache of more than 2^31 elements, read in place, gives what it gives alone."""
    tokens, width = (16, 16, 16) if rows == 600 else (8, 8, 16), 1024
    if torch.cuda.get_device_properties(device).total_memory < 24e9:
        pytest.skip("needs a device with 24 GB")
    cache = torch.empty(rows, math.prod(tokens), width, dtype=torch.bfloat16, device=device).normal_()
    assert cache.numel() > 2**31
    whole = torch.tensor([[0, 0, 0, 1, 1, 1.0]], device=device)
    box = torch.tensor([[0.4, 0.5, 0.3, 0.5, 0.5, 0.5]], device=device)
    index = torch.tensor([[rows - 1]], device=device)
    rest = {"source_grids": [tokens], "grid": (8, 8, 8), "backend": "triton"}
    out = sample_context([cache], [whole.expand(rows, 6)], box, source_index=index, **rest)
    alone = sample_context([cache[-1:].clone()], [whole], box, **rest)
    assert torch.equal(out, alone)
