"""Multi-level context (paper eq. 7-9): what the coarser levels know about a patch, and its fusion into the patch.

    ctx = 1/K sum_k trilinear(a_k, box relative to box_k)                 sample_context
    out = concat[x, ctx, c] @ W.T + b = x @ Wx.T + ctx @ Wc.T + c @ Wcoord.T + b      fuse_context

with ``x [B, N, D]``, sources ``a_k [B_k, N_k, D]``, ``c`` the absolute coordinates of the tokens. Averaging,
interpolating and projecting commute, so the context product is taken before interpolating and on the *footprint* alone,
the few tokens of ``a_k`` that the patch touches (at ratio 2, ``n / 2 + 2`` of a parent's ``n`` per axis). Nothing is
concatenated and no context is written: the forward reads x, the footprints and W and writes out.

Where many patches read the same sources (the tiles of a level, at every step of a sampler), the product is taken once
for whole sources, ``p_k = a_k @ Wc.T`` (``project_sources``), and every patch pays for interpolation alone
(``fuse_projected``).

``context_ops`` registers the ops, ``context_torch`` has the portable implementation, ``context_triton`` the kernels,
``context_geometry`` the positions, ``context_checks`` the validation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels import _backend, _checks, reference
from hpdm_kernels.context import ops as context_ops
from hpdm_kernels.context.checks import as_tuple, check_context, flatten_triples
from hpdm_kernels.context.geometry import footprint_size
from hpdm_kernels.context.triton_backend import aot_specs

__all__ = ["aot_specs", "footprint_size", "fuse_context", "fuse_projected", "project_sources", "sample_context"]

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    return context_ops.sample_fwd(
        sources, source_boxes, box, source_index, flatten_triples(source_grids), list(grid),
        flatten_triples(footprints), chosen,
    )  # fmt: skip


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
    return _fuse(
        "fuse_context", x, sources, source_boxes, box, weight, bias, source_grids, grid, source_index, footprints,
        precision, backend,
    )  # fmt: skip


def project_sources(
    sources: Sequence[Tensor], weight: Tensor, *, precision: str | None = None, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Sources through the context columns of a fusion weight, ``a_k @ weight[:, D:2D].T``, for :func:`fuse_projected`.

    The product that :func:`fuse_context` takes for the footprints of each patch anew, taken once for whole sources: it
    pays where the tokens of all footprints are more than the sources have, as in a sampler with cached levels.

    Args:
        sources: K >= 1 tensors ``[B_k, N_k, D]``, float16/bfloat16/float32/float64.
        weight: ``[D, 2D + 3]`` or ``[D, 2D]``, as for :func:`fuse_context`; dtype of the sources.
        precision, backend: as for :func:`fuse_context`.

    Returns:
        K tensors ``[B_k, N_k, D]``. Differentiable with respect to the sources and ``weight``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fuse_context`.
    """
    precision = _backend.resolve_precision(precision)
    sources = as_tuple("sources", sources)
    if not sources:
        raise ValueError("sources: got none, expected at least one tensor [B_k, N_k, D]")
    first = _checks.check_tensor("sources[0]", sources[0], ("B_0", "N_0", "D"))
    for k, source in enumerate(sources):
        _checks.check_tensor(f"sources[{k}]", source, (f"B_{k}", f"N_{k}", first.shape[2]), like=("sources[0]", first))
    weight = _check_weight(weight, first.shape[2], ("sources[0]", first))
    chosen = _backend.resolve(backend, "project_sources", first, TRITON_DTYPES)
    if chosen == "reference":
        return reference.project_sources(sources, weight)
    return tuple(context_ops.project_fwd(source, weight, precision, chosen) for source in sources)


def fuse_projected(
    x: Tensor,
    projected: Sequence[Tensor],
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
    """:func:`fuse_context` of sources that :func:`project_sources` projected: the context costs interpolation alone.

    ``fuse_projected(x, project_sources(a, weight), ...)`` is ``fuse_context(x, a, ...)`` up to rounding.

    Args:
        projected: K >= 1 tensors ``[B_k, N_k, D]``, what :func:`project_sources` made with the same ``weight``.
        weight: as for :func:`fuse_context`; of its context columns nothing is read here, and their gradient is zero.
        x, source_boxes, box, bias, source_grids, grid, source_index, footprints, precision, backend: as for
            :func:`fuse_context`.

    Returns:
        ``[B, N, D]``, dtype of ``x``. Differentiable with respect to ``x``, ``projected``, ``weight`` and ``bias``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fuse_context`.
    """
    return _fuse(
        "fuse_projected", x, projected, source_boxes, box, weight, bias, source_grids, grid, source_index, footprints,
        precision, backend,
    )  # fmt: skip


def _fuse(
    op: str,
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None,
    footprints: Sequence[Sequence[int]] | None,
    precision: str | None,
    backend: str,
) -> Tensor:
    precision = _backend.resolve_precision(precision)
    names = ("sources", "source_boxes") if op == "fuse_context" else ("projected", "source_boxes")
    sources, source_boxes = (as_tuple(name, value) for name, value in zip(names, (sources, source_boxes)))
    x = _checks.check_tensor("x", x, ("B", "N", "D"))
    b, n, d = x.shape
    source_grids, grid, footprints = check_context(
        sources, source_boxes, box, source_grids, grid, source_index, footprints, ("x", x), b, names[0]
    )
    if grid[0] * grid[1] * grid[2] != n:
        raise ValueError(f"grid: got {grid} with product {grid[0] * grid[1] * grid[2]}, expected {n} tokens as in x")
    weight = _check_weight(weight, d, ("x", x))
    if bias is not None:
        bias = _checks.check_tensor("bias", bias, (d,), like=("x", x))
    chosen = _backend.resolve(backend, op, x, TRITON_DTYPES)
    if chosen == "reference":
        formula = reference.fuse_context if op == "fuse_context" else reference.fuse_projected
        return formula(x, sources, source_boxes, box, weight, bias, source_grids, grid, source_index)
    return context_ops.fuse_fwd(
        x, sources, source_boxes, box, weight, bias, source_index, flatten_triples(source_grids), list(grid),
        flatten_triples(footprints), op == "fuse_projected", precision, chosen,
    )  # fmt: skip


def _check_weight(weight: Tensor, d: int, like: tuple[str, Tensor]) -> Tensor:
    columns = 2 * d if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == 2 * d else 2 * d + 3
    return _checks.check_tensor("weight", weight, (d, columns), like=like)
