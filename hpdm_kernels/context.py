"""Multi-level context (paper eq. 7-9): what the coarser levels know about a patch, and its fusion into the patch.

    ctx = 1/K sum_k trilinear(a_k, box relative to box_k)                 sample_context
    out = concat[x, ctx, c] @ W.T + b = x @ Wx.T + ctx @ Wc.T + c @ Wcoord.T + b      fuse_context

with ``x [B, N, D]``, sources ``a_k [B_k, N_k, D]``, ``c`` the absolute coordinates of the tokens. Averaging,
interpolating and projecting commute, so the context product is taken before interpolating and on the *footprint* alone,
the few tokens of ``a_k`` that the patch touches (at ratio 2, ``n / 2 + 2`` of a parent's ``n`` per axis). Nothing is
concatenated and no context is written: the forward reads x, the footprints and W and writes out. ``context_torch`` has
the portable implementation, ``context_triton`` the kernels, ``context_geometry`` the positions, ``context_checks`` the
validation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels import _backend, _checks, context_torch, context_triton, reference
from hpdm_kernels.context_checks import as_tuple, check_context, flatten_triples
from hpdm_kernels.context_geometry import footprint_size
from hpdm_kernels.context_triton import aot_specs

__all__ = ["aot_specs", "footprint_size", "fuse_context", "sample_context"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# ---- registered ops: flat lists of ints, because a schema has no nested lists ----


def _triples(flat: Sequence[int]) -> list[Sequence[int]]:
    return [flat[i : i + 3] for i in range(0, len(flat), 3)]


@torch.library.custom_op("hpdm::sample_context_fwd", mutates_args=())
def _sample_fwd(
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


@_sample_fwd.register_fake
def _(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[int],
    grid: Sequence[int],
    footprints: Sequence[int],
    backend: str,
) -> Tensor:
    return sources[0].new_empty(box.shape[0], grid[0] * grid[1] * grid[2], sources[0].shape[2])


@torch.library.custom_op("hpdm::sample_context_bwd", mutates_args=())
def _sample_bwd(
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


@_sample_bwd.register_fake
def _(
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
    return [s.new_empty(s.shape) for s, want in zip(sources, wanted) if want]


def _sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    sources, source_boxes, box, source_index, *ctx.rest = inputs
    ctx.count = len(sources)
    ctx.save_for_backward(box, source_index, *sources, *source_boxes)


def _sample_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    box, source_index, *tensors = ctx.saved_tensors
    sources, source_boxes = tensors[: ctx.count], tensors[ctx.count :]
    source_grids, grid, footprints, backend = ctx.rest
    wanted = list(ctx.needs_input_grad[0])
    grads = iter(
        _sample_bwd(grad, sources, source_boxes, box, source_index, source_grids, grid, footprints, wanted, backend)
    )
    return [next(grads) if want else None for want in wanted], [None] * ctx.count, None, None, None, None, None, None


_sample_fwd.register_autograd(_sample_autograd, setup_context=_sample_setup)


@torch.library.custom_op("hpdm::fuse_context_fwd", mutates_args=())
def _fuse_fwd(
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
    precision: str,
    backend: str,
) -> Tensor:
    args = (x, sources, source_boxes, box, weight, bias, source_index, _triples(source_grids), grid)
    with _backend.unmixed(x):
        if backend == "triton":
            return context_triton.fuse_forward(*args, _triples(footprints), precision)
        return context_torch.fuse_forward(*args, _triples(footprints))


@_fuse_fwd.register_fake
def _(
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
    precision: str,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("hpdm::fuse_context_bwd", mutates_args=())
def _fuse_bwd(
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
    precision: str,
    backend: str,
) -> list[Tensor]:
    args = (grad, x, sources, source_boxes, box, weight, bias, source_index, _triples(source_grids), grid)
    with _backend.unmixed(x):
        if backend == "triton":
            return context_triton.fuse_backward(*args, _triples(footprints), wanted, precision)
        return context_torch.fuse_backward(*args, _triples(footprints), wanted)


@_fuse_bwd.register_fake
def _(
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
    precision: str,
    backend: str,
) -> list[Tensor]:
    inputs = (x, weight, bias, *sources)
    return [t.new_empty(t.shape) for t, want in zip(inputs, wanted) if want and t is not None]


def _fuse_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sources, source_boxes, box, weight, bias, source_index, *ctx.rest = inputs
    ctx.count = len(sources)
    ctx.save_for_backward(x, box, weight, bias, source_index, *sources, *source_boxes)


def _fuse_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, box, weight, bias, source_index, *tensors = ctx.saved_tensors
    sources, source_boxes = tensors[: ctx.count], tensors[ctx.count :]
    source_grids, grid, footprints, precision, backend = ctx.rest
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[4], bias is not None and needs[5], *needs[1]]
    grads = iter(
        _fuse_bwd(
            grad, x, sources, source_boxes, box, weight, bias, source_index, source_grids, grid, footprints,
            wanted, precision, backend,
        )
    )  # fmt: skip
    of_x, of_weight, of_bias, *of_sources = (next(grads) if want else None for want in wanted)
    return of_x, of_sources, [None] * ctx.count, None, of_weight, of_bias, None, None, None, None, None, None


_fuse_fwd.register_autograd(_fuse_autograd, setup_context=_fuse_setup)


# ---- public functions ----


def sample_context(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    *,
    source_index: Tensor | None = None,
    footprints: Sequence[Sequence[int]] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Samples the context of a patch from the coarser levels, paper eq. 7: the mean over sources of trilinear samples.

    Sampling is ``F.grid_sample(..., align_corners=False, padding_mode="border")`` of each source at the patch's tokens.

    Args:
        sources: K >= 1 tensors ``[B_k, N_k, D]``, float16/bfloat16/float32/float64; tokens run over frames, height,
            width, the last fastest.
        source_boxes: K tensors ``[B_k, 6]`` float32, a row is (offset f, h, w, scale f, h, w), fractions of the video.
        box: the patch's boxes, ``[B, 6]`` float32. Each lies inside its sources' boxes (within 1e-5).
        source_grids: K triples (F_k, H_k, W_k) with ``F_k * H_k * W_k == N_k``.
        grid: tokens of the patch per axis, (F, H, W), any numbers.
        source_index: ``[B, K]`` int32 or int64, the row of source k that serves sample b. ``None``: row b, with
            ``B_k == B``. Lets cached tiles be sampled without a copy.
        footprints: K triples, an upper bound of the source tokens that a patch touches per axis, see
            :func:`footprint_size`. ``None``: read from the boxes on the CPU; the whole source grid on CUDA and under
            ``torch.compile``, where values cannot be looked at; that is right but slower. On CUDA a bound that is
            too small cannot be detected and samples the wrong place.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, F * H * W, D]``, dtype of the sources. Differentiable with respect to the sources; boxes get no gradient.

    Raises:
        TypeError: a dtype that does not fit, or not a tensor or triple.
        ValueError: shapes or devices that do not fit; on the CPU a box outside the video or outside its source's box,
            a row number outside the source, a footprint that is too small.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    sources, source_boxes = (
        as_tuple("sources", sources),
        as_tuple("source_boxes", source_boxes),
    )
    if not sources:
        raise ValueError("sources: got none, expected at least one tensor [B_k, N_k, D]")
    first = _checks.check_tensor("sources[0]", sources[0], ("B_0", "N_0", "D"))
    source_grids, grid, footprints = check_context(
        sources, source_boxes, box, source_grids, grid, source_index, footprints, ("sources[0]", first), "B"
    )
    chosen = _backend.resolve(backend, "sample_context", first, TRITON_DTYPES)
    if chosen == "reference":
        return reference.sample_context(sources, source_boxes, box, source_grids, grid, source_index)
    return _sample_fwd(
        sources,
        source_boxes,
        box,
        source_index,
        flatten_triples(source_grids),
        list(grid),
        flatten_triples(footprints),
        chosen,
    )


def fuse_context(
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    *,
    source_index: Tensor | None = None,
    footprints: Sequence[Sequence[int]] | None = None,
    precision: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Fuses a patch with its context and coordinates, paper eq. 9: ``concat[x, ctx, c] @ weight.T + bias``.

    ``ctx`` is :func:`sample_context`, ``c`` the tokens' absolute coordinates (f, h, w) in the whole video, fractions.

    Args:
        x: the patch's tokens ``[B, N, D]``, float16/bfloat16/float32/float64.
        sources: K >= 1 tensors ``[B_k, N_k, D]``, dtype of ``x``.
        source_boxes: K tensors ``[B_k, 6]`` float32, as for :func:`sample_context`.
        box: the patch's boxes, ``[B, 6]`` float32.
        weight: ``[D, 2D + 3]``, or ``[D, 2D]`` to leave the coordinates out; dtype of ``x``.
        bias: ``[D]`` or ``None``; dtype of ``x``.
        source_grids: K triples (F_k, H_k, W_k) with product ``N_k``.
        grid: (F, H, W) with product ``N``.
        source_index: ``[B, K]`` int32 or int64 or ``None``, as for :func:`sample_context`.
        footprints: K triples or ``None``, as for :func:`sample_context`.
        precision: of fp32 products of the kernels, ``"ieee"``, ``"tf32x3"``, ``"tf32"``; ``None`` follows
            :func:`torch.get_float32_matmul_precision`. The other backends always follow torch's settings.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, N, D]``, dtype of ``x``. Differentiable with respect to ``x``, the sources, ``weight`` and ``bias``; boxes
        get no gradient. Only inputs are saved for the backward.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sample_context`; ``ValueError`` too for an unknown precision.
    """
    precision = _backend.resolve_precision(precision)
    sources, source_boxes = (
        as_tuple("sources", sources),
        as_tuple("source_boxes", source_boxes),
    )
    x = _checks.check_tensor("x", x, ("B", "N", "D"))
    b, n, d = x.shape
    source_grids, grid, footprints = check_context(
        sources, source_boxes, box, source_grids, grid, source_index, footprints, ("x", x), b
    )
    if grid[0] * grid[1] * grid[2] != n:
        raise ValueError(f"grid: got {grid} with product {grid[0] * grid[1] * grid[2]}, expected {n} tokens as in x")
    columns = 2 * d if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == 2 * d else 2 * d + 3
    weight = _checks.check_tensor("weight", weight, (d, columns), like=("x", x))
    if bias is not None:
        bias = _checks.check_tensor("bias", bias, (d,), like=("x", x))
    chosen = _backend.resolve(backend, "fuse_context", x, TRITON_DTYPES)
    if chosen == "reference":
        return reference.fuse_context(x, sources, source_boxes, box, weight, bias, source_grids, grid, source_index)
    return _fuse_fwd(
        x, sources, source_boxes, box, weight, bias, source_index, flatten_triples(source_grids), list(grid),
        flatten_triples(footprints), precision, chosen,
    )  # fmt: skip
