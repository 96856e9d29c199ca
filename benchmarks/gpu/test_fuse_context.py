"""Fusion of context into tokens at odd and real shapes, every arithmetic."""

import pytest
import torch

from benchmarks.gpu.checks import ARITHMETIC, check, needs_cuda
from benchmarks.gpu.test_context import SHAPES
from benchmarks.shapes import UCF_S, TiledContextShape
from hpdm_kernels import fuse_context, fuse_projected, project_sources, reference

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


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_fuse_projected(request, device, generator, arithmetic):
    """Tiles that share the rows of caches, projected once: the same formula, and every gradient."""
    dtype, precision, factor = ARITHMETIC[arithmetic]
    shape = TiledContextShape(UCF_S, batch=4)
    sources, boxes, box, index = shape.make_tiles(generator, device)
    d = shape.width
    x = torch.randn(shape.batch, shape.tokens, d, device=device).to(dtype)
    weight = (torch.randn(d, 2 * d + 3, device=device) / (2 * d) ** 0.5).to(dtype)
    bias = torch.randn(d, device=device).to(dtype)
    rest = (shape.source_grids, shape.grid)
    check(
        request,
        lambda x, w, b, *s: fuse_projected(
            x, project_sources(s, w, precision=precision, backend="triton"), boxes, box, w, b, *rest,
            source_index=index, footprints=shape.footprints, precision=precision, backend="triton",
        ),
        lambda x, w, b, *s: reference.fuse_context(x, s, boxes, box, w, b, *rest, index),
        (x, weight, bias, *(s.to(dtype) for s in sources)),
        factor=factor,
        tf32=precision == "tf32",
    )  # fmt: skip


@pytest.mark.parametrize("footprints", [True, False], ids=["footprints", "whole"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_cuda_graph(device, generator, arithmetic, footprints):
    """No launch waits for the device or depends on values: captured once, replayed for other boxes, the eager bits."""
    dtype, precision, _ = ARITHMETIC[arithmetic]
    shape = SHAPES[0]
    sources, boxes, box = shape.make(generator, device, dtype)
    d = shape.width
    x, grad = (torch.randn(shape.batch, shape.tokens, d, device=device).to(dtype) for _ in range(2))
    weight = (torch.randn(d, 2 * d + 3, device=device) / (2 * d) ** 0.5).to(dtype)
    leaves = [t.requires_grad_() for t in (x, weight, torch.randn(d, device=device).to(dtype), *sources)]

    def step():
        out = fuse_context(
            x, sources, boxes, box, weight, leaves[2], shape.source_grids, shape.grid,
            footprints=shape.footprints if footprints else None, precision=precision, backend="triton",
        )  # fmt: skip
        return (out, *torch.autograd.grad(out, leaves, grad))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and lets cuBLAS take its memory
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        _, other_boxes, other_box = shape.make(generator, device, dtype)
        for ours, other in zip((*boxes, box), (*other_boxes, other_box), strict=True):
            ours.copy_(other)
        graph.replay()
        for i, (replayed, eager) in enumerate(zip(captured, step(), strict=True)):
            assert torch.equal(replayed, eager), f"tensor {i} differs"
