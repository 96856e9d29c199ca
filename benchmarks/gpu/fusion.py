"""Checks the fusion of context into tokens (paper eq. 9) at odd and real shapes, in every arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.cases import ARITHMETIC, Case, against_formula, capture
from benchmarks.gpu.context import SHAPES
from benchmarks.shapes import UCF_S, ContextShape, TiledContextShape
from hpdm_kernels import fuse_context, fuse_projected, project_sources, reference
from hpdm_kernels.testing import Comparison


def fused(
    shape: ContextShape, coordinates: bool, arithmetic: str, device: torch.device, generator: torch.Generator
) -> Comparison:
    """``fuse_context``, with and without the weight's columns for the coordinates."""
    dtype, precision, _ = ARITHMETIC[arithmetic]
    sources, boxes, box = shape.make(generator, device, dtype)
    d = shape.width
    x = torch.randn(shape.batch, shape.tokens, d, device=device).to(dtype)
    weight = (torch.randn(d, 2 * d + 3 * coordinates, device=device) / (2 * d) ** 0.5).to(dtype)
    bias = torch.randn(d, device=device).to(dtype)
    grids = (shape.source_grids, shape.grid)
    return against_formula(
        lambda x, w, b, *s: fuse_context(
            x, s, boxes, box, w, b, *grids, footprints=shape.footprints, precision=precision, backend="triton"
        ),
        lambda x, w, b, *s: reference.fuse_context(x, s, boxes, box, w, b, *grids),
        (x, weight, bias, *sources),
        arithmetic,
    )


def projected_once(arithmetic: str, device: torch.device, generator: torch.Generator) -> Comparison:
    """``project_sources`` and ``fuse_projected`` for tiles that share cached rows, against the formula of eq. 9."""
    dtype, precision, _ = ARITHMETIC[arithmetic]
    shape = TiledContextShape(UCF_S, batch=4)
    sources, boxes, box, index = shape.make_tiles(generator, device)
    d = shape.width
    x = torch.randn(shape.batch, shape.tokens, d, device=device).to(dtype)
    weight = (torch.randn(d, 2 * d + 3, device=device) / (2 * d) ** 0.5).to(dtype)
    bias = torch.randn(d, device=device).to(dtype)
    grids = (shape.source_grids, shape.grid)
    return against_formula(
        lambda x, w, b, *s: fuse_projected(
            x, project_sources(s, w, precision=precision, backend="triton"), boxes, box, w, b, *grids,
            source_index=index, footprints=shape.footprints, precision=precision, backend="triton",
        ),
        lambda x, w, b, *s: reference.fuse_context(x, s, boxes, box, w, b, *grids, index),
        (x, weight, bias, *(s.to(dtype) for s in sources)),
        arithmetic,
    )  # fmt: skip


def cuda_graph(footprints: bool, arithmetic: str, device: torch.device, generator: torch.Generator) -> None:
    """A captured CUDA graph, replayed for other boxes, gives the bits of eager calls: launches depend on no values."""
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

    graph, captured = capture(step)
    for _ in range(2):
        _, new_boxes, new_box = shape.make(generator, device, dtype)
        for captured_box, fresh_box in zip((*boxes, box), (*new_boxes, new_box), strict=True):
            captured_box.copy_(fresh_box)
        graph.replay()
        for i, (replayed, eager) in enumerate(zip(captured, step(), strict=True)):
            assert torch.equal(replayed, eager), f"tensor {i} differs"


def cases() -> Iterator[Case]:
    """All cases, by arithmetic."""
    for arithmetic in ARITHMETIC:
        for shape in SHAPES:
            for name, coordinates in (("coordinates", True), ("plain", False)):
                yield Case(f"fuse_context[{shape}-{name}-{arithmetic}]", partial(fused, shape, coordinates, arithmetic))
        yield Case(f"fuse_projected[{arithmetic}]", partial(projected_once, arithmetic))
        for name, footprints in (("footprints", True), ("whole", False)):
            yield Case(f"cuda_graph[{arithmetic}-{name}]", partial(cuda_graph, footprints, arithmetic))
