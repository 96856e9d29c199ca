"""The registered ops of the context: schema, shapes for tracing, gradients, and products for FLOP counters.

A schema has no nested lists, so triples are flat and the six fields of a :class:`Geometry` are separate arguments. Both
backends receive them as one :class:`Geometry`. The argument names are part of the schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from hpdm_kernels._backend import autocast_off, custom_op
from hpdm_kernels._checks import triples
from hpdm_kernels.context import torch_backend, triton_backend
from hpdm_kernels.context.geometry import Geometry
from hpdm_kernels.context.weight import FusionWeight


def _implementation(backend: str) -> ModuleType:
    return triton_backend if backend == "triton" else torch_backend


def _empty_gradients(tensors: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor]:
    """What a backward op returns while tracing: an empty contiguous gradient for each tensor that needs one."""
    return [t.new_empty(t.shape) for t, needed in zip(tensors, needs_grad) if needed and t is not None]


def _spread(gradients: Sequence[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """One entry per tensor: its gradient, as returned by a backward op, if it needs one, else ``None``."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in needs_grad]


def _empty_plan(box: Tensor, sources: Sequence[Tensor], backend: str) -> Tensor:
    """The plan that a forward op returns while tracing: positions of the patches in their sources, for the backward."""
    shape = (box.shape[0], len(sources), triton_backend.PLAN_COLUMNS) if backend == "triton" else (0,)
    return box.new_empty(shape, dtype=torch.int32)


# ---- sampling: mean over sources of trilinear samples (eq. 7) ----


@custom_op("sample_context_fwd")
def sample_fwd(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[int],
    grid: Sequence[int],
    footprints: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Mean over the sources of trilinear samples, ``[B, N, D]`` (eq. 7), and the plan for the backward."""
    geometry = Geometry.from_flat(source_boxes, box, source_index, source_grids, grid, footprints)
    with autocast_off(box):
        return _implementation(backend).sample_forward(sources, geometry)


@sample_fwd.register_fake
def _(
    sources: Sequence[Tensor], source_boxes: Any, box: Tensor, source_index: Any, source_grids: Any,
    grid: Sequence[int], footprints: Any, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = sources[0].new_empty(box.shape[0], grid[0] * grid[1] * grid[2], sources[0].shape[2])
    return out, _empty_plan(box, sources, backend)


@custom_op("sample_context_bwd")
def sample_bwd(
    grad: Tensor,
    plan: Tensor,
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
    """Gradients ``[B_k, N_k, D]`` of the sources selected by ``wanted``, from ``grad [B, N, D]``."""
    geometry = Geometry.from_flat(source_boxes, box, source_index, source_grids, grid, footprints)
    with autocast_off(box):
        return _implementation(backend).sample_backward(grad, sources, geometry, plan, wanted)


@sample_bwd.register_fake
def _(
    grad: Any, plan: Any, sources: Sequence[Tensor], source_boxes: Any, box: Any, source_index: Any, source_grids: Any,
    grid: Any, footprints: Any, wanted: Sequence[bool], backend: Any,
) -> list[Tensor]:  # fmt: skip
    return _empty_gradients(sources, wanted)


def _setup_sample(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    sources, source_boxes, box, source_index, *ctx.shapes, ctx.backend = inputs
    ctx.num_sources = len(sources)
    ctx.save_for_backward(box, source_index, output[1], *sources, *source_boxes)


def _backward_sample(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    box, source_index, plan, *tensors = ctx.saved_tensors
    sources, source_boxes = tensors[: ctx.num_sources], tensors[ctx.num_sources :]
    needs_grad = list(ctx.needs_input_grad[0])
    gradients = sample_bwd(grad, plan, sources, source_boxes, box, source_index, *ctx.shapes, needs_grad, ctx.backend)
    return _spread(gradients, needs_grad), [None] * ctx.num_sources, *[None] * 6


sample_fwd.register_autograd(_backward_sample, setup_context=_setup_sample)


# ---- fusion: x @ Wx.T + context @ Wc.T + coordinates @ Wcoord.T + bias (eq. 9) ----


@custom_op("fuse_context_fwd")
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
) -> tuple[Tensor, Tensor]:
    """``[B, N, D]`` (eq. 9), and the plan for the backward.

    ``projected``: the sources are already multiplied by the weight's context columns.
    """
    geometry = Geometry.from_flat(source_boxes, box, source_index, source_grids, grid, footprints)
    with autocast_off(x):
        return _implementation(backend).fuse_forward(
            x, sources, geometry, FusionWeight.split(weight), bias, projected, precision
        )


@fuse_fwd.register_fake
def _(x: Tensor, sources: Sequence[Tensor], source_boxes: Any, box: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_plan(box, sources, arguments[-1])


@custom_op("fuse_context_bwd")
def fuse_bwd(
    grad: Tensor,
    plan: Tensor,
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
    """Gradients of those of ``x, weight, bias, *sources`` that ``wanted`` selects, in this order."""
    geometry = Geometry.from_flat(source_boxes, box, source_index, source_grids, grid, footprints)
    with autocast_off(x):
        return _implementation(backend).fuse_backward(
            grad, x, sources, geometry, plan, FusionWeight.split(weight), wanted, projected, precision
        )


@fuse_bwd.register_fake
def _(
    grad: Any, plan: Any, x: Tensor, sources: Sequence[Tensor], source_boxes: Any, box: Any, weight: Tensor,
    bias: Tensor | None, source_index: Any, source_grids: Any, grid: Any, footprints: Any, wanted: Sequence[bool],
    projected: Any, precision: Any, backend: Any,
) -> list[Tensor]:  # fmt: skip
    return _empty_gradients((x, weight, bias, *sources), wanted)


def _setup_fuse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, sources, source_boxes, box, weight, bias, source_index, *ctx.shapes, projected, precision, backend = inputs
    ctx.num_sources, ctx.options = len(sources), (projected, precision, backend)
    ctx.save_for_backward(x, box, weight, bias, source_index, output[1], *sources, *source_boxes)


def _backward_fuse(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, box, weight, bias, source_index, plan, *tensors = ctx.saved_tensors
    sources, source_boxes = tensors[: ctx.num_sources], tensors[ctx.num_sources :]
    need_x, need_sources, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    needs_grad = [need_x, need_weight, bias is not None and need_bias, *need_sources]
    gradients = fuse_bwd(
        grad, plan, x, sources, source_boxes, box, weight, bias, source_index, *ctx.shapes, needs_grad, *ctx.options
    )
    grad_x, grad_weight, grad_bias, *grad_sources = _spread(gradients, needs_grad)
    return grad_x, grad_sources, [None] * ctx.num_sources, None, grad_weight, grad_bias, *[None] * 7


fuse_fwd.register_autograd(_backward_fuse, setup_context=_setup_fuse)


# ---- projection: a whole source times the weight's context columns ----


@custom_op("project_source_fwd")
def project_fwd(source: Tensor, weight: Tensor, precision: str, backend: str) -> Tensor:
    """``source @ Wc.T``: ``[B_k, N_k, D] -> [B_k, N_k, D]``."""
    rows = source.reshape(-1, source.shape[2])
    with autocast_off(source):
        return _implementation(backend).project(rows, FusionWeight.split(weight), precision).view(source.shape)


@project_fwd.register_fake
def _(source: Tensor, weight: Any, precision: Any, backend: Any) -> Tensor:
    return source.new_empty(source.shape)


@custom_op("project_source_bwd")
def project_bwd(
    grad: Tensor, source: Tensor, weight: Tensor, wanted: Sequence[bool], precision: str, backend: str
) -> list[Tensor]:
    """Gradients of those of ``source, weight`` that ``wanted`` selects, in this order."""
    grad_rows, rows = (t.reshape(-1, t.shape[2]) for t in (grad, source))
    with autocast_off(source):
        gradients = _implementation(backend).project_backward(
            grad_rows, rows, FusionWeight.split(weight), wanted, precision
        )
    return [gradients[0].view(source.shape), *gradients[1:]] if wanted[0] else gradients


@project_bwd.register_fake
def _(
    grad: Any, source: Tensor, weight: Tensor, wanted: Sequence[bool], precision: Any, backend: Any
) -> list[Tensor]:  # fmt: skip
    return _empty_gradients((source, weight), wanted)


def _setup_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, weight, *ctx.options = inputs
    ctx.save_for_backward(source, weight)


def _backward_project(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needs_grad = list(ctx.needs_input_grad[:2])
    gradients = project_bwd(grad, *ctx.saved_tensors, needs_grad, *ctx.options)
    return *_spread(gradients, needs_grad), None, None


project_fwd.register_autograd(_backward_project, setup_context=_setup_project)


# ---- products, for PyTorch's FLOP counter ----
# The counter passes shapes in place of tensors. It counts only products, so interpolation counts as zero.


def _footprint_rows(batch: int, footprints: Sequence[int]) -> list[int]:
    """Number of tokens of all samples' footprints, for each source."""
    return [batch * f * h * w for f, h, w in triples(footprints)]


@register_flop_formula(torch.ops.hpdm.fuse_context_fwd)
def _fuse_flops(
    x: Any, sources: Any, source_boxes: Any, box: Any, weight: Any, bias: Any, source_index: Any, source_grids: Any,
    grid: Any, footprints: Any, projected: bool, *arguments: Any, **kwargs: Any,
) -> int:  # fmt: skip
    b, n, d = x
    return 2 * d * d * (b * n + (0 if projected else sum(_footprint_rows(b, footprints))))


@register_flop_formula(torch.ops.hpdm.fuse_context_bwd)
def _fuse_backward_flops(
    grad: Any, plan: Any, x: Any, sources: Any, source_boxes: Any, box: Any, weight: Any, bias: Any, source_index: Any,
    source_grids: Any, grid: Any, footprints: Any, wanted: Any, projected: bool, *arguments: Any, **kwargs: Any,
) -> int:  # fmt: skip
    need_x, need_weight, _, *need_sources = wanted
    b, n, d = x
    rows = b * n * (need_x + need_weight)
    if not projected:
        rows += sum(p * (need_weight + need) for p, need in zip(_footprint_rows(b, footprints), need_sources))
    return 2 * d * d * rows


@register_flop_formula(torch.ops.hpdm.project_source_fwd)
def _project_flops(source: Any, *arguments: Any, **kwargs: Any) -> int:
    b, n, d = source
    return 2 * b * n * d * d


@register_flop_formula(torch.ops.hpdm.project_source_bwd)
def _project_backward_flops(
    grad: Any, source: Any, weight: Any, wanted: Any, *arguments: Any, **kwargs: Any
) -> int:  # fmt: skip
    return sum(wanted) * _project_flops(source)
