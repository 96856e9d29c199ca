"""Checks context sampling at odd and real shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.cases import DTYPES, Case, against_formula, needs_memory
from benchmarks.shapes import T2V, T2V_1K, UCF_S, ContextShape, Pyramid
from hpdm_kernels import reference, sample_context
from hpdm_kernels.testing import Comparison

SHAPES = (
    ContextShape(Pyramid("odd", (5, 28, 12), (1, 4, 4), 4, (1, 2, 2), 64, width=40), batch=3),
    ContextShape(Pyramid("single token", (1, 4, 4), (1, 4, 4), 2, (2, 2, 2), 64, width=16)),
    ContextShape(UCF_S),
    ContextShape(T2V, batch=2),
    ContextShape(T2V_1K),
)
# Caches of more than 2^31 elements: number of rows -> grid of tokens of a row.
LARGE_CACHES = {600: (16, 16, 16), 3000: (8, 8, 16)}


def sampled(
    shape: ContextShape, footprints: bool, dtype: str, device: torch.device, generator: torch.Generator
) -> Comparison:
    """``sample_context`` with one source row per sample, with and without footprints."""
    sources, boxes, box = shape.make(generator, device, DTYPES[dtype])
    geometry = (boxes, box, shape.source_grids, shape.grid)
    bounds = shape.footprints if footprints else None
    return against_formula(
        lambda *s: sample_context(s, *geometry, footprints=bounds, backend="triton"),
        lambda *s: reference.sample_context(s, *geometry),
        sources,
    )


def cached_rows(index_dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Comparison:
    """``source_index``: samples read rows of the sources, some rows twice and some never."""
    shape = SHAPES[0]
    sources, boxes, box = shape.make(generator, device)
    # Every sample must lie inside its source row's box, so all rows get the same box.
    boxes = tuple(b[:1].expand(5, 6).contiguous() for b in boxes)
    box = box[:1].expand(3, 6).contiguous()
    sources = tuple(torch.randn(5, shape.tokens, shape.width, device=device) for _ in sources)
    index = torch.randint(0, 5, (3, len(sources)), generator=generator).to(device, index_dtype)
    geometry = (boxes, box, shape.source_grids, shape.grid)
    return against_formula(
        lambda *s: sample_context(s, *geometry, source_index=index, footprints=shape.footprints, backend="triton"),
        lambda *s: reference.sample_context(s, *geometry, index.long()),
        sources,
    )


def large_cache(rows: int, device: torch.device, generator: torch.Generator) -> None:
    """Sampling the last row of a cache of more than 2^31 elements in place equals sampling a copy of that row."""
    needs_memory(device, 24)
    tokens, width = LARGE_CACHES[rows], 1024
    cache = torch.empty(rows, math.prod(tokens), width, dtype=torch.bfloat16, device=device).normal_()
    assert cache.numel() > 2**31
    whole = torch.tensor([[0, 0, 0, 1, 1, 1.0]], device=device)
    box = torch.tensor([[0.4, 0.5, 0.3, 0.5, 0.5, 0.5]], device=device)
    index = torch.tensor([[rows - 1]], device=device)
    grids = {"source_grids": [tokens], "grid": (8, 8, 8), "backend": "triton"}
    out = sample_context([cache], [whole.expand(rows, 6)], box, source_index=index, **grids)
    alone = sample_context([cache[-1:].clone()], [whole], box, **grids)
    assert torch.equal(out, alone)


def cases() -> Iterator[Case]:
    """All cases."""
    for shape in SHAPES:
        for name, footprints in (("footprints", True), ("whole", False)):
            for dtype in DTYPES:
                yield Case(f"sample_context[{shape}-{name}-{dtype}]", partial(sampled, shape, footprints, dtype))
    for index_dtype in (torch.int32, torch.int64):
        yield Case(f"source_index[{index_dtype}]", partial(cached_rows, index_dtype))
    for rows in LARGE_CACHES:
        yield Case(f"large_cache[{rows}]", partial(large_cache, rows))
