"""Random configurations of the context ops."""

from __future__ import annotations

import math

import torch

import hpdm_kernels
from hpdm_kernels.testing import formulas
from hpdm_kernels.testing.case import Arguments, Case
from hpdm_kernels.testing.draw import Draw

# Positions are rounded to fp32 once, which moves them by a fraction of a token that grows with the source's grid.
ULPS = 64.0
PRECISIONS = (None, "ieee", "tf32x3")
"""``"tf32"`` is left out: its errors are not those of fp32."""


def _geometry(draw: Draw) -> Arguments:
    """Boxes, grids, rows and footprints, for sources of any width."""
    batch, count = draw.size(4), draw.choose((1, 1, 2, 3))
    source_grids = [draw.triple(5) for _ in range(count)]
    shared = draw.chance(0.4)
    rows = [draw.size(4) if shared else batch for _ in range(count)]
    if shared:  # any patch reads any row, so every source covers the whole video
        whole = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
        source_boxes = [whole.expand(n, 6) if draw.chance(0.5) else whole.repeat(n, 1) for n in rows]
        box = draw.boxes(batch, overshoot=True)
    else:
        source_boxes = [draw.boxes(batch)]
        while len(source_boxes) < count:
            source_boxes.append(draw.boxes(batch, source_boxes[-1]))
        box = draw.boxes(batch, source_boxes[-1], overshoot=True)
    index = torch.stack([torch.randint(0, n, (batch,), generator=draw.generator) for n in rows], dim=1)
    grid = draw.triple(5)
    arguments: Arguments = {
        "source_boxes": tuple(source_boxes),
        "box": box.t().contiguous().t() if draw.chance(0.5) else box,
        "source_grids": source_grids,
        "grid": grid,
        "source_index": draw.view(index.to(draw.choose((torch.int32, torch.int64)))) if shared else None,
    }
    if draw.chance(0.4):
        arguments["footprints"] = [_footprint(draw, arguments, k) for k in range(count)]
    return arguments


def _footprint(draw: Draw, arguments: Arguments, k: int) -> tuple[int, ...]:
    """An upper bound of the tokens that the patches touch in source ``k``."""
    box, source_box, index = arguments["box"], arguments["source_boxes"][k], arguments["source_index"]
    source_box = source_box if index is None else source_box[index[:, k].long()]
    bound = []
    for axis, (n, m) in enumerate(zip(arguments["grid"], arguments["source_grids"][k])):
        touched = formulas.interpolation(box, source_box, axis, n, m).sum(dim=1) > 0  # [B, m]
        spans = [int(row.nonzero().max() - row.nonzero().min()) + 1 for row in touched]
        # One more, for a neighbor that rounding touches.
        bound.append(min(m, max(spans) + 1 + draw.choose((0, 0, 1, m))))
    return tuple(bound)


def _sources(draw: Draw, arguments: Arguments, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(
        draw.normal(len(source_box), math.prod(grid), width, dtype=dtype)
        for source_box, grid in zip(arguments["source_boxes"], arguments["source_grids"])
    )


def _ulps(arguments: Arguments, dtype: torch.dtype, backend: str) -> float:
    """Positions relative to a small box round more, if they are computed in the dtype that interpolates.

    That is fp64 for fp64, and for the reference the dtype of the sums; the other backends compute them in fp64.
    """
    if backend != "reference" and dtype is not torch.float64:
        return ULPS
    return ULPS / min(b[:, 3:].min().item() for b in arguments["source_boxes"])


def sample_context(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.sample_context`."""
    arguments = _geometry(draw)
    arguments["sources"] = _sources(draw, arguments, draw.size(9), dtype)
    return Case(
        hpdm_kernels.sample_context, formulas.sample_context, arguments, ("sources",), 4.0,
        _ulps(arguments, dtype, backend),
    )  # fmt: skip


def _fusion(draw: Draw, dtype: torch.dtype, backend: str, projected: bool) -> Case:
    arguments, width = _geometry(draw), draw.size(9)
    batch, tokens = len(arguments["box"]), math.prod(arguments["grid"])
    name = "projected" if projected else "sources"
    arguments |= {
        "x": draw.normal(batch, tokens, width, dtype=dtype),
        name: _sources(draw, arguments, width, dtype),
        "weight": draw.normal(width, 2 * width + draw.choose((0, 3)), dtype=dtype),
        "bias": draw.normal(width, dtype=dtype) if draw.chance(0.7) else None,
    }
    arguments["precision"] = draw.choose(PRECISIONS)
    ours, formula = (
        (hpdm_kernels.fuse_projected, formulas.fuse_projected)
        if projected
        else (hpdm_kernels.fuse_context, formulas.fuse_context)
    )
    return Case(ours, formula, arguments, ("x", name, "weight", "bias"), 8.0, _ulps(arguments, dtype, backend))


def fuse_context(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.fuse_context`."""
    return _fusion(draw, dtype, backend, projected=False)


def fuse_projected(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.fuse_projected`."""
    return _fusion(draw, dtype, backend, projected=True)


def project_sources(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.project_sources`."""
    width = draw.size(17)
    arguments = {
        "sources": tuple(
            draw.normal(draw.size(3), draw.size(12), width, dtype=dtype) for _ in range(draw.choose((1, 2, 3)))
        ),
        "weight": draw.normal(width, 2 * width + draw.choose((0, 3)), dtype=dtype),
        "precision": draw.choose(PRECISIONS),
    }
    return Case(hpdm_kernels.project_sources, formulas.project_sources, arguments, ("sources", "weight"), 8.0, 8.0)
