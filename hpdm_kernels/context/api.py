"""Multi-level context (paper eq. 7-9): samples the coarser levels at a patch's tokens and fuses them into the patch.

    ctx = 1/K sum_k trilinear(a_k, box relative to box_k)                                           sample_context
    out = concat[x, ctx, c] @ W.T + b = x @ Wx.T + ctx @ Wc.T + c @ Wcoord.T + b                    fuse_context

with ``x [B, N, D]``, sources ``a_k [B_k, N_k, D]`` and ``c [B, N, 3]``, the absolute coordinates of the tokens. The
*footprint* of a patch in ``a_k`` is the tokens of ``a_k`` that its interpolation reads: at ratio 2, ``n / 2 + 2`` of a
parent's ``n`` per axis. Averaging, interpolating and projecting commute, so the product with Wc is computed before
interpolating, for the footprints only. The concatenation and the context never reach memory: the forward reads x, the
footprints and W, and writes out.

Often many patches read the same sources: the tiles of a level, at every step of a sampler. Then the product is computed
once for whole sources, ``p_k = a_k @ Wc.T`` (``project_sources``), and each patch only interpolates
(``fuse_projected``).

``ops`` registers the ops, ``torch_backend`` and ``triton_backend`` implement them, ``geometry`` computes positions,
``checks`` validates arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hpdm_kernels import _transforms, reference
from hpdm_kernels._backend import autocast_off, resolve, resolve_precision
from hpdm_kernels._checks import check_tensor
from hpdm_kernels.context import ops
from hpdm_kernels.context.checks import check_context, check_sources, check_weight
from hpdm_kernels.context.geometry import footprint_size

__all__ = ["footprint_size", "fuse_context", "fuse_projected", "project_sources", "sample_context"]


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
        sources: K >= 1 tensors ``[B_k, N_k, D]``, float16/bfloat16/float32/float64; tokens are ordered by frame, height
            and width, width fastest.
        source_boxes: K tensors ``[B_k, 6]`` float32; a row is (offset f, h, w, scale f, h, w), in fractions of the
            video.
        box: the patch's boxes, ``[B, 6]`` float32. Each lies inside its sources' boxes (within 1e-5).
        source_grids: K triples (F_k, H_k, W_k) with ``F_k * H_k * W_k == N_k``.
        grid: tokens of the patch per axis, (F, H, W), of any size.
        source_index: ``[B, K]`` int32 or int64, the row of source k that sample b reads, so that cached tiles are
            sampled without a copy. ``None``: sample b reads row b, and ``B_k == B``.
        footprints: K triples, upper bounds of the source tokens that a patch touches per axis, see
            :func:`footprint_size`. ``None``: computed from the boxes on the CPU. On CUDA and under ``torch.compile``
            the boxes cannot be read, and ``None`` means the whole source grid, which is correct but slower. A bound
            that is too small is not detected there and gives wrong samples.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, F * H * W, D]``, dtype of the sources. Differentiable with respect to the sources; boxes get no gradient.
        A NaN or infinity makes every output not finite that gives its token a weight, and may reach others of the same
        sample and channel, but no other.

    Raises:
        TypeError: a wrong dtype, or not a tensor or triple.
        ValueError: wrong shapes or devices; on the CPU also a box outside the video or outside its source's box, a row
            index outside the source, or a footprint that is too small.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.
    """
    sources = check_sources("sources", sources)
    first = check_tensor("sources[0]", sources[0], ("B_0", "N_0", "D"))
    geometry = check_context(
        "sources", sources, ("sources[0]", first), "B", source_boxes=source_boxes, box=box,
        source_grids=source_grids, grid=grid, source_index=source_index, footprints=footprints,
    )  # fmt: skip
    chosen = resolve(backend, "sample_context", first)
    if chosen == "reference":
        with autocast_off(first):
            return reference.sample_context(sources, source_boxes, box, source_grids, grid, source_index)
    _transforms.refuse("sample_context", chosen, (*sources, *source_boxes, box))
    out, _ = ops.sample_fwd(sources, *geometry.flat(), chosen)
    return out


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
        precision: how the kernels compute fp32 products: ``"ieee"``, ``"tf32x3"``, ``"tf32"``; ``None`` follows
            :func:`torch.get_float32_matmul_precision`. The other backends always follow PyTorch's setting.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, N, D]``, dtype of ``x``. Differentiable with respect to ``x``, the sources, ``weight`` and ``bias``; boxes
        get no gradient. Only inputs, and 64 bytes per sample and source, are saved for the backward. A NaN or infinity
        in a source may reach all outputs of the samples that read it, but no other; see :func:`sample_context`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sample_context`; also ``ValueError`` for an unknown precision.
    """
    return _fuse(
        "sources", x, sources, weight, bias, precision, backend, source_boxes=source_boxes, box=box,
        source_grids=source_grids, grid=grid, source_index=source_index, footprints=footprints,
    )  # fmt: skip


def project_sources(
    sources: Sequence[Tensor], weight: Tensor, *, precision: str | None = None, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Multiplies sources by a fusion weight's context columns, ``a_k @ weight[:, D:2D].T``, for :func:`fuse_projected`.

    :func:`fuse_context` computes this product, a part of paper eq. 9, for the footprints of every patch. Here it is
    computed once for whole sources. That is faster if all footprints together have more tokens than the sources, as in
    a sampler with cached levels.

    Args:
        sources: K >= 1 tensors ``[B_k, N_k, D]``, float16/bfloat16/float32/float64.
        weight: ``[D, 2D + 3]`` or ``[D, 2D]``, as for :func:`fuse_context`; dtype of the sources.
        precision, backend: as for :func:`fuse_context`.

    Returns:
        K tensors ``[B_k, N_k, D]``. Differentiable with respect to the sources and ``weight``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fuse_context`.
    """
    precision = resolve_precision(precision)
    sources = check_sources("sources", sources)
    first = check_tensor("sources[0]", sources[0], ("B_0", "N_0", "D"))
    like, d = ("sources[0]", first), first.shape[2]
    for k, source in enumerate(sources):
        check_tensor(f"sources[{k}]", source, (f"B_{k}", f"N_{k}", d), like=like)
    weight = check_weight(weight, d, like)
    chosen = resolve(backend, "project_sources", first)
    if chosen == "reference":
        with autocast_off(first):
            return reference.project_sources(sources, weight)
    _transforms.refuse("project_sources", chosen, (*sources, weight))
    return tuple(ops.project_fwd(source, weight, precision, chosen) for source in sources)


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
    """:func:`fuse_context` (paper eq. 9) of sources that :func:`project_sources` has projected; only interpolates them.

    ``fuse_projected(x, project_sources(a, weight), ...)`` equals ``fuse_context(x, a, ...)`` up to rounding.

    Args:
        projected: K >= 1 tensors ``[B_k, N_k, D]``, the results of :func:`project_sources` with the same ``weight``.
        weight: as for :func:`fuse_context`; its context columns are not read here, and their gradient is zero.
        x, source_boxes, box, bias, source_grids, grid, source_index, footprints, precision, backend: as for
            :func:`fuse_context`.

    Returns:
        ``[B, N, D]``, dtype of ``x``. Differentiable with respect to ``x``, ``projected``, ``weight`` and ``bias``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`fuse_context`.
    """
    return _fuse(
        "projected", x, projected, weight, bias, precision, backend, source_boxes=source_boxes, box=box,
        source_grids=source_grids, grid=grid, source_index=source_index, footprints=footprints,
    )  # fmt: skip


def _fuse(
    name: str,
    x: Tensor,
    sources: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    precision: str | None,
    backend: str,
    **geometry_arguments: Any,
) -> Tensor:
    """Checks the arguments and fuses; ``name`` is what the caller calls the sources, ``"sources"`` or ``"projected"``.

    ``geometry_arguments`` are those of :func:`check_context`.
    """
    projected = name == "projected"
    precision = resolve_precision(precision)
    sources = check_sources(name, sources)
    x = check_tensor("x", x, ("B", "N", "D"))
    b, n, d = x.shape
    geometry = check_context(name, sources, ("x", x), b, **geometry_arguments)
    f, h, w = geometry.grid
    if f * h * w != n:
        raise ValueError(f"grid: got {geometry.grid} with product {f * h * w}, expected {n} tokens as in x")
    weight = check_weight(weight, d, ("x", x))
    if bias is not None:
        bias = check_tensor("bias", bias, (d,), like=("x", x))
    op = "fuse_projected" if projected else "fuse_context"
    chosen = resolve(backend, op, x)
    if chosen == "reference":
        formula = reference.fuse_projected if projected else reference.fuse_context
        source_boxes, box, source_index, source_grids, grid, _ = geometry
        with autocast_off(x):
            return formula(x, sources, source_boxes, box, weight, bias, source_grids, grid, source_index)
    _transforms.refuse(op, chosen, (x, *sources, *geometry.source_boxes, geometry.box, weight, bias))
    source_boxes, box, *index_and_shapes = geometry.flat()
    out, _ = ops.fuse_fwd(x, sources, source_boxes, box, weight, bias, *index_and_shapes, projected, precision, chosen)
    return out
