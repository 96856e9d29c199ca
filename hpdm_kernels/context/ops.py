"""The registered ops behind ``context``: schema, shapes for tracing, and gradients.

Nested lists are flat here, because a schema has none. ``projected`` says that sources come through the context columns
of the weight already (a cache of :func:`hpdm_kernels.project_sources`), so that no context product is left to take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hpdm_kernels import _backend
from hpdm_kernels.context import torch_backend as context_torch
from hpdm_kernels.context import triton_backend as context_triton


def _triples(flat: Sequence[int]) -> list[Sequence[int]]:
    return [flat[i : i + 3] for i in range(0, len(flat), 3)]


# ---- sampling: mean over sources of trilinear samples ----


@torch.library.custom_op("hpdm::sample_context_fwd", mutates_args=())
def sample_fwd(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[int],
    grid: Sequence[int],
    footprints: Sequence[int],
    backend: str,
) -> Tensor:
    forward = context_triton.sample_forward if backend == "triton" else context_torch.sample_forward
    with _backend.unmixed(box):
        return forward(sources, source_boxes, box, source_index, _triples(source_grids), grid, _triples(footprints))


@sample_fwd.register_fake
def _(sources: Any, source_boxes: Any, box: Tensor, index: Any, grids: Any, grid: Sequence[int], *rest: Any) -> Tensor:
    return sources[0].new_empty(box.shape[0], grid[0] * grid[1] * grid[2], sources[0].shape[2])


@torch.library.custom_op("hpdm::sample_context_bwd", mutates_args=())
def sample_bwd(
    grad: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[int],
    grid: Sequence[int],
    footprints: Sequence[int],
    wanted: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    backward = context_triton.sample_backward if backend == "triton" else context_torch.sample_backward
    with _backend.unmixed(box):
        return backward(
            grad, sources, source_boxes, box, source_index, _triples(source_grids), grid, _triples(footprints), wanted
        )


@sample_bwd.register_fake
def _(grad: Tensor, sources: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    wanted = rest[-2]
    return [s.new_empty(s.shape) for s, want in zip(sources, wanted) if want]


def _sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, source_boxes, box, source_index, *ctx.rest = inputs
    ctx.count = len(sources)
    ctx.save_for_backward(box, source_index, *sources, *source_boxes)


def _sample_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    box, source_index, *tensors = ctx.saved_tensors
    sources, source_boxes = tensors[: ctx.count], tensors[ctx.count :]
    *geometry, backend = ctx.rest
    wanted = list(ctx.needs_input_grad[0])
    grads = iter(sample_bwd(grad, sources, source_boxes, box, source_index, *geometry, wanted, backend))
    return [next(grads) if want else None for want in wanted], [None] * ctx.count, *[None] * 6


sample_fwd.register_autograd(_sample_autograd, setup_context=_sample_setup)


# ---- fusion: x @ Wx.T + context @ Wc.T + coordinates + bias ----


@torch.library.custom_op("hpdm::fuse_context_fwd", mutates_args=())
def fuse_fwd(
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
    source_grids: Sequence[int],
    grid: Sequence[int],
    footprints: Sequence[int],
    projected: bool,
    precision: str,
    backend: str,
) -> Tensor:
    args = (x, sources, source_boxes, box, weight, bias, source_index, _triples(source_grids), grid)
    with _backend.unmixed(x):
        if backend == "triton":
            return context_triton.fuse_forward(*args, _triples(footprints), precision, projected)
        return context_torch.fuse_forward(*args, _triples(footprints), projected)


@fuse_fwd.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("hpdm::fuse_context_bwd", mutates_args=())
def fuse_bwd(
    grad: Tensor,
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
    source_grids: Sequence[int],
    grid: Sequence[int],
    footprints: Sequence[int],
    wanted: Sequence[bool],
    projected: bool,
    precision: str,
    backend: str,
) -> list[Tensor]:
    args = (grad, x, sources, source_boxes, box, weight, bias, source_index, _triples(source_grids), grid)
    with _backend.unmixed(x):
        if backend == "triton":
            return context_triton.fuse_backward(*args, _triples(footprints), wanted, precision, projected)
        return context_torch.fuse_backward(*args, _triples(footprints), wanted, projected)


@fuse_bwd.register_fake
def _(
    grad: Tensor, x: Tensor, sources: Sequence[Tensor], source_boxes: Any, box: Any, weight: Tensor,
    bias: Tensor | None, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    wanted = rest[-4]
    return [t.new_empty(t.shape) for t, want in zip((x, weight, bias, *sources), wanted) if want and t is not None]


def _fuse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sources, source_boxes, box, weight, bias, source_index, *ctx.rest = inputs
    ctx.count = len(sources)
    ctx.save_for_backward(x, box, weight, bias, source_index, *sources, *source_boxes)


def _fuse_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, box, weight, bias, source_index, *tensors = ctx.saved_tensors
    sources, source_boxes = tensors[: ctx.count], tensors[ctx.count :]
    *geometry, projected, precision, backend = ctx.rest
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[4], bias is not None and needs[5], *needs[1]]
    args = (grad, x, sources, source_boxes, box, weight, bias, source_index, *geometry)
    grads = iter(fuse_bwd(*args, wanted, projected, precision, backend))
    of_x, of_weight, of_bias, *of_sources = (next(grads) if want else None for want in wanted)
    return of_x, of_sources, [None] * ctx.count, None, of_weight, of_bias, *[None] * 7


fuse_fwd.register_autograd(_fuse_autograd, setup_context=_fuse_setup)


# ---- projection: a whole source through the context columns ----


@torch.library.custom_op("hpdm::project_source_fwd", mutates_args=())
def project_fwd(source: Tensor, weight: Tensor, precision: str, backend: str) -> Tensor:
    rows = source.reshape(-1, source.shape[2])
    with _backend.unmixed(source):
        if backend == "triton":
            return context_triton.project(rows, weight, precision).view(source.shape)
        return context_torch.project(rows, weight).view(source.shape)


@project_fwd.register_fake
def _(source: Tensor, *rest: Any) -> Tensor:
    return source.new_empty(source.shape)


@torch.library.custom_op("hpdm::project_source_bwd", mutates_args=())
def project_bwd(
    grad: Tensor, source: Tensor, weight: Tensor, wanted: Sequence[bool], precision: str, backend: str
) -> list[Tensor]:
    rows, grads = source.reshape(-1, source.shape[2]), grad.reshape(-1, grad.shape[2])
    with _backend.unmixed(source):
        if backend == "triton":
            found = context_triton.project_backward(grads, rows, weight, wanted, precision)
        else:
            found = context_torch.project_backward(grads, rows, weight, wanted)
    return [found[0].view(source.shape), *found[1:]] if wanted[0] else found


@project_bwd.register_fake
def _(grad: Tensor, source: Tensor, weight: Tensor, wanted: Sequence[bool], *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, want in zip((source, weight), wanted) if want]


def _project_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, weight, *ctx.rest = inputs
    ctx.save_for_backward(source, weight)


def _project_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:2])
    grads = iter(project_bwd(grad, *ctx.saved_tensors, wanted, *ctx.rest))
    return *(next(grads) if want else None for want in wanted), None, None


project_fwd.register_autograd(_project_autograd, setup_context=_project_setup)


# ---- products, for PyTorch's FLOP counter; interpolation, like all that is elementwise, counts nothing there ----


def _footprint_rows(batch: int, footprints: Sequence[int]) -> list[int]:
    return [batch * f * h * w for f, h, w in _triples(footprints)]


@register_flop_formula(torch.ops.hpdm.fuse_context_fwd)
def _fuse_flops(x: Any, sources: Any, boxes: Any, box: Any, weight: Any, *rest: Any, **kwargs: Any) -> int:
    footprints, projected = rest[4], rest[5]
    b, n, d = x
    return 2 * d * d * (b * n + (0 if projected else sum(_footprint_rows(b, footprints))))


@register_flop_formula(torch.ops.hpdm.fuse_context_bwd)
def _fuse_bwd_flops(
    grad: Any, x: Any, sources: Any, boxes: Any, box: Any, weight: Any, *rest: Any, **kwargs: Any
) -> int:
    footprints, (want_x, want_weight, _, *want_sources), projected = rest[4:7]
    b, n, d = x
    rows = b * n * (want_x + want_weight)
    if not projected:
        rows += sum(p * (want_weight + want) for p, want in zip(_footprint_rows(b, footprints), want_sources))
    return 2 * d * d * rows


@register_flop_formula(torch.ops.hpdm.project_source_fwd)
def _project_flops(source: Any, *rest: Any, **kwargs: Any) -> int:
    b, n, d = source
    return 2 * b * n * d * d


@register_flop_formula(torch.ops.hpdm.project_source_bwd)
def _project_bwd_flops(grad: Any, source: Any, weight: Any, wanted: Any, *rest: Any, **kwargs: Any) -> int:
    return sum(wanted) * _project_flops(source)
