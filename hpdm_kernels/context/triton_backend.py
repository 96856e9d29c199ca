"""Multi-level context on the GPU: launches of ``triton_kernels``.

Forward: write the tables, multiply the footprints by Wc, compute ``x @ Wx.T``, and add context, coordinates and bias to
it in one kernel. Footprints are copied only for their product; the interpolation reads its tokens in place. Backward:
the transposed interpolation runs one axis after another. At relative scale 1/2 about 4 tokens per axis contribute to a
footprint token, so this reads 12 rows instead of 64. The rest is plain products on the footprints and one gathered sum
per source token.

Plain products are PyTorch's if its own setting equals ``precision``, so that ``precision`` governs every product.
Otherwise a kernel computes them; it adds ``x @ Wx.T`` to the context directly, which saves a pass over the output.
Most of the time goes to ``x @ Wx.T``, then to adding the context, which at least reads and writes the output.

Beyond its inputs the forward allocates at most the output, the projections, and a copy of Wx with aligned rows: rows of
``2D + 3`` elements would be loaded 4 bytes instead of 16 bytes at a time. The copied footprints of a source are freed
before the output is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels._backend import resolve_precision
from hpdm_kernels._layout import dense_rows
from hpdm_kernels._triton import launch_grid, triton
from hpdm_kernels.context import triton_kernels as kernels
from hpdm_kernels.context.block_sizes import (
    CONTRACT,
    ROWS,
    SUMS,
    SUMS_CHUNK,
    add_context_tile,
    fuse_context_tile,
    product_tile,
)
from hpdm_kernels.context.geometry import Geometry
from hpdm_kernels.context.weight import FusionWeight


class Tables(NamedTuple):
    """A :class:`Geometry` as the kernels read it (see ``triton_kernels``), and the tokens that they interpolate."""

    footprint_table: Tensor
    """``[B, K, 10]`` int32."""
    position_table: Tensor
    """``[B, K, 6]`` fp32."""
    address_table: Tensor
    """``[B, K, 4]`` int64."""
    tokens: Sequence[Tensor]
    """``K`` tensors ``[rows, n, D]`` at these addresses; they must not be freed before the kernels are launched."""

    @property
    def aligned(self) -> bool:
        """Whether every row of ``tokens`` can be loaded 16 bytes at a time."""
        return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == t.stride(1) % 16 == 0 for t in self.tokens)


def _tables(geometry: Geometry, tokens: Sequence[Tensor], whole: Sequence[bool] | None = None) -> Tables:
    """The tables for interpolating ``tokens``: sources ``[B_k, N_k, D]``, or footprints ``[B, P_k, D]``.

    ``whole`` tells which of them are sources; ``None``: all.
    """
    box, index = geometry.box.contiguous(), geometry.source_index
    b, count = box.shape[0], len(geometry.source_boxes)
    tokens = [dense_rows(t) for t in tokens]
    footprint_table = torch.empty(b, count, 10, dtype=torch.int32, device=box.device)
    position_table = torch.empty(b, count, 6, dtype=torch.float32, device=box.device)
    address_table = torch.empty(b, count, 4, dtype=torch.int64, device=box.device)
    for k, t in enumerate(tokens):
        kernels._context_geometry_kernel[launch_grid(b)](
            box, geometry.source_boxes[k].contiguous(), box if index is None else index.contiguous(),
            footprint_table, position_table, address_table, k, count,
            *geometry.grid, *geometry.source_grids[k], *geometry.footprints[k],
            t.data_ptr(), t.stride(0), t.stride(1), t.itemsize,
            HAS_INDEX=index is not None, WHOLE=whole is None or whole[k], num_warps=1,
        )  # fmt: skip
    return Tables(footprint_table, position_table, address_table, tokens)


def _gather(source: Tensor, k: int, tables: Tables, out: Tensor) -> Tensor:
    """Copies the footprints of all samples in source ``k`` to ``out [B * P_k, D]``, and returns it."""
    b, count, _ = tables.footprint_table.shape
    source = dense_rows(source)
    p, d = out.shape[0] // b, source.shape[2]
    kernels._context_gather_kernel[launch_grid(triton.cdiv(p, ROWS.rows), triton.cdiv(d, ROWS.columns), b)](
        source, out, tables.footprint_table, k, count, p, d, source.stride(0), source.stride(1),
        BLOCK_T=ROWS.rows, BLOCK_D=ROWS.columns, num_warps=ROWS.num_warps,
    )  # fmt: skip
    return out


def _scatter(grad: Tensor, k: int, source: Tensor, tables: Tables, has_index: bool) -> Tensor:
    """The transpose of the gather: gradient of source ``k``, ``[B_k, N_k, D]``, from ``grad [B * P_k, D]``."""
    b, count, _ = tables.footprint_table.shape
    rows, n, d = source.shape
    out = source.new_empty(rows, n, d)
    kernels._context_scatter_kernel[launch_grid(triton.cdiv(n, ROWS.rows), triton.cdiv(d, ROWS.columns), rows)](
        grad, out, tables.footprint_table, k, count, b, n, grad.shape[0] // b, d,
        HAS_INDEX=has_index, BLOCK_T=ROWS.rows, BLOCK_D=ROWS.columns, num_warps=ROWS.num_warps,
    )  # fmt: skip
    return out


def _contract(grad: Tensor, tables: Tables, geometry: Geometry, chosen: Sequence[int]) -> Tensor:
    """Transposed interpolation of ``grad [B, N, D]`` (contiguous): gradients of the chosen sources' footprints.

    Returns:
        ``[sum_k B * P_k, D]``, concatenated source by source.
    """
    b, count, _ = tables.position_table.shape
    (f, h, w), d = geometry.grid, grad.shape[2]
    counts = [geometry.footprint_rows[k] for k in chosen]
    result = grad.new_empty(sum(counts), d)
    for k, footprint_grad in zip(chosen, result.split(counts)):
        pf, ph, pw = geometry.footprints[k]
        value = grad
        for axis, per_sample, n, p, width in ((2, f * h, w, pw, d), (1, f, h, ph, pw * d), (0, 1, f, pf, ph * pw * d)):
            rows = b * per_sample * p
            out = footprint_grad if axis == 0 else value.new_empty(rows, width, dtype=torch.float32)
            blocks = triton.cdiv(rows, CONTRACT.rows), triton.cdiv(width, CONTRACT.columns)
            kernels._context_contract_kernel[launch_grid(*blocks)](
                value, out, tables.position_table, k, count, rows, per_sample, n, p, width, AXIS=axis, MEAN=axis == 0,
                BLOCK_R=CONTRACT.rows, BLOCK_D=CONTRACT.columns, num_warps=CONTRACT.num_warps,
            )  # fmt: skip
            value = out
    return result


def _coordinate_sums(grad: Tensor, geometry: Geometry) -> Tensor:
    """``[4, D]`` fp32: sums of ``grad [B, N, D]`` over samples and tokens, weighted by the coordinates, and by 1."""
    b, n, d = grad.shape
    chunks = triton.cdiv(n, SUMS_CHUNK)
    out = torch.empty(b, chunks, 4, d, dtype=torch.float32, device=grad.device)
    kernels._coordinate_sums_kernel[launch_grid(chunks, triton.cdiv(d, SUMS.columns), b)](
        grad, geometry.box.contiguous(), out, n, d, *geometry.grid, SUMS_CHUNK,
        BLOCK_T=SUMS.rows, BLOCK_D=SUMS.columns, num_warps=SUMS.num_warps,
    )  # fmt: skip
    return out.sum((0, 1))


def _add_context(
    out: Tensor, tables: Tables, geometry: Geometry, coordinates: Tensor | None, bias: Tensor | None, onto: bool
) -> None:
    """Writes context, coordinates and bias to ``out [B, N, D]``; ``onto``: adds them to ``out`` instead.

    ``coordinates [D, 3]`` is the weight's columns for the coordinates, contiguous.
    """
    (n_f, n_h, n_w), box, d = geometry.grid, geometry.box, out.shape[2]
    aligned = tables.aligned
    tile = add_context_tile(out.itemsize, aligned)
    blocks = triton.cdiv(n_f * n_h, tile.lines) * triton.cdiv(n_w, tile.tokens)
    kernels._add_context_kernel[launch_grid(blocks, triton.cdiv(d, tile.columns), box.shape[0])](
        tables.position_table, tables.footprint_table, tables.address_table, box.contiguous(),
        box if coordinates is None else coordinates, box if bias is None else bias.contiguous(), out,
        len(tables.tokens), d, n_f, n_h, n_w,
        ONTO=onto, HAS_BIAS=bias is not None, HAS_COORDINATES=coordinates is not None, ALIGNED=aligned,
        **tile.blocks, num_warps=tile.num_warps,
    )  # fmt: skip


def _multiply_onto_context(
    x: Tensor,
    weight: Tensor,
    tables: Tables,
    geometry: Geometry,
    coordinates: Tensor | None,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """``x @ weight.T`` plus context, coordinates and bias in one kernel, in ``precision``: ``[B, N, D]``."""
    (n_f, n_h, n_w), (b, n, d) = geometry.grid, x.shape
    out, x = x.new_empty(b, n, d), dense_rows(x)
    tile = fuse_context_tile(precision)
    blocks = triton.cdiv(n_f * n_h, tile.lines) * triton.cdiv(n_w, tile.tokens)
    kernels._fuse_context_fwd_kernel[launch_grid(blocks, triton.cdiv(d, tile.columns), b)](
        x, weight, tables.position_table, tables.footprint_table, tables.address_table, geometry.box.contiguous(),
        weight if coordinates is None else coordinates, weight if bias is None else bias.contiguous(), out,
        len(tables.tokens), d, n_f, n_h, n_w, x.stride(0), x.stride(1), weight.stride(0),
        HAS_BIAS=bias is not None, HAS_COORDINATES=coordinates is not None, PRECISION=precision,
        **tile.blocks, BLOCK_K=tile.inner, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _pytorch_multiplies(dtype: torch.dtype, precision: str) -> bool:
    """Whether PyTorch's own setting computes products of ``dtype`` in ``precision``."""
    return dtype is not torch.float32 or precision == resolve_precision(None)


def _aligned_rows(columns: Tensor) -> Tensor:
    """``columns`` of a weight, copied if their rows are not aligned to 16 bytes, as in rows of ``2D + 3`` elements."""
    aligned = columns.stride(1) == 1 and columns.stride(0) * columns.itemsize % 16 == columns.data_ptr() % 16 == 0
    return columns if aligned else columns.contiguous()


def _matmul(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """``a @ b`` for ``a [M, K]`` and ``b [K, N]`` of any strides. The last axis of ``out [M, N]`` has stride 1."""
    if _pytorch_multiplies(a.dtype, precision):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if precision == "tf32" and b.stride(0) != 1 and b.numel() < a.numel():
        # Hopper's TF32 product needs the inner dimension contiguous; transposing in the kernel would load 4 bytes at a
        # time.
        b = b.t().contiguous().t()
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    tile = product_tile(precision)
    blocks = triton.cdiv(a.shape[0], tile.rows), triton.cdiv(b.shape[1], tile.columns)
    kernels._context_matmul_kernel[launch_grid(*blocks)](
        a, b, out, a.shape[0], b.shape[1], a.shape[1], *a.stride(), *b.stride(), out.stride(0), PRECISION=precision,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def sample_forward(sources: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Mean over the sources of trilinear samples, ``[B, N, D]`` (eq. 7)."""
    n_f, n_h, n_w = geometry.grid
    out = sources[0].new_empty(geometry.box.shape[0], n_f * n_h * n_w, sources[0].shape[2])
    with torch.cuda.device_of(out):
        _add_context(out, _tables(geometry, sources), geometry, None, None, onto=False)
    return out


def sample_backward(
    grad: Tensor, sources: Sequence[Tensor], geometry: Geometry, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Gradients ``[B_k, N_k, D]`` of the sources that need one, from ``grad [B, N, D]``."""
    chosen = [k for k, needed in enumerate(needs_grad) if needed]
    with torch.cuda.device_of(grad):
        tables = _tables(geometry, sources)
        grads = _contract(grad.contiguous(), tables, geometry, chosen)
        return [
            _scatter(g, k, sources[k], tables, geometry.source_index is not None)
            for k, g in zip(chosen, grads.split([geometry.footprint_rows[k] for k in chosen]))
        ]


def fuse_forward(
    x: Tensor,
    sources: Sequence[Tensor],
    geometry: Geometry,
    weight: FusionWeight,
    bias: Tensor | None,
    projected: bool,
    precision: str,
) -> Tensor:
    """``concat[x, context, coordinates] @ weight.T + bias``, ``[B, N, D]`` (eq. 9). ``projected``: the sources are."""
    b, n, d = x.shape
    coordinates = None if weight.of_coordinates is None else weight.of_coordinates.contiguous()
    with torch.cuda.device_of(x):
        tables = _tables(geometry, sources) if projected else _project_footprints(sources, geometry, weight, precision)
        of_x = _aligned_rows(weight.of_x)
        if not _pytorch_multiplies(x.dtype, precision) and tables.aligned:
            return _multiply_onto_context(x, of_x, tables, geometry, coordinates, bias, precision)
        out = _matmul(x.reshape(-1, d), of_x.t(), precision).view(b, n, d)
        _add_context(out, tables, geometry, coordinates, bias, onto=True)
    return out


def _project_footprints(sources: Sequence[Tensor], geometry: Geometry, weight: FusionWeight, precision: str) -> Tables:
    """Tables for the products of the footprints with Wc; of whole sources where these have no more tokens."""
    b, d, counts = geometry.box.shape[0], sources[0].shape[2], geometry.footprint_rows
    whole = [s.shape[0] * s.shape[1] <= count for s, count in zip(sources, counts)]
    shapes = [s.shape if w else (b, count // b, d) for s, w, count in zip(sources, whole, counts)]
    tables = _tables(geometry, [s.new_empty(shape) for s, shape in zip(sources, shapes)], whole)
    of_context = _aligned_rows(weight.of_context).t()
    for k, (source, out) in enumerate(zip(sources, tables.tokens)):
        # Do not bind the copied footprint to a name: it must be freed after its product.
        _matmul(
            source.reshape(-1, d) if whole[k] else _gather(source, k, tables, source.new_empty(counts[k], d)),
            of_context, precision, out.view(-1, d),
        )  # fmt: skip
    return tables


def fuse_backward(
    grad: Tensor,
    x: Tensor,
    sources: Sequence[Tensor],
    geometry: Geometry,
    weight: FusionWeight,
    needs_grad: Sequence[bool],
    projected: bool,
    precision: str,
) -> list[Tensor]:
    """Gradients of those of ``x, weight, bias, *sources`` that need one, in this order; ``grad`` is ``[B, N, D]``."""
    need_x, need_weight, need_bias, *need_sources = needs_grad
    grad = grad.contiguous()
    rows = grad.view(-1, x.shape[2])  # [B * N, D]
    # Sources whose footprints need a gradient: those that need one themselves, and all if the weight needs one, unless
    # the sources are projected already.
    chosen = [k for k, needed in enumerate(need_sources) if needed or (need_weight and not projected)]
    counts = [geometry.footprint_rows[k] for k in chosen]
    result = []
    with torch.cuda.device_of(x):
        if need_x:
            result.append(_matmul(rows, _aligned_rows(weight.of_x), precision).view(x.shape))
        if not any(needs_grad[1:]):
            return result
        tables = _tables(geometry, sources)
        context_grad = _contract(grad, tables, geometry, chosen)  # [sum_k B * P_k, D]
        need_coordinates = need_weight and weight.of_coordinates is not None
        sums = _coordinate_sums(grad, geometry) if need_bias or need_coordinates else rows[:0]  # [4, D]
        if need_weight:
            whole, part = weight.new_empty()
            part.of_x.copy_(_matmul(rows.t(), x.reshape(rows.shape), precision))
            if projected:
                part.of_context.zero_()
            else:
                tokens = x.new_empty(sum(counts), x.shape[2])  # [sum_k B * P_k, D]
                for k, out in zip(chosen, tokens.split(counts)):
                    _gather(sources[k], k, tables, out)
                part.of_context.copy_(_matmul(context_grad.t(), tokens, precision))
            if part.of_coordinates is not None:
                part.of_coordinates.copy_(sums[:3].t())
            result.append(whole)
        if need_bias:
            result.append(sums[3].to(x.dtype, copy=True))
        for k, g in zip(chosen, context_grad.split(counts)):
            if need_sources[k]:
                source_grad = g if projected else _matmul(g, _aligned_rows(weight.of_context), precision)
                result.append(_scatter(source_grad, k, sources[k], tables, geometry.source_index is not None))
    return result


def project(rows: Tensor, weight: FusionWeight, precision: str) -> Tensor:
    """``rows @ Wc.T``, the product with the weight's context columns: ``[R, D] -> [R, D]``."""
    with torch.cuda.device_of(rows):
        return _matmul(rows, _aligned_rows(weight.of_context).t(), precision)


def project_backward(
    grad: Tensor, rows: Tensor, weight: FusionWeight, needs_grad: Sequence[bool], precision: str
) -> list[Tensor]:
    """Gradients of those of ``rows`` and the weight that need one; ``grad`` and ``rows`` are ``[R, D]``."""
    result = []
    with torch.cuda.device_of(rows):
        if needs_grad[0]:
            result.append(_matmul(grad, _aligned_rows(weight.of_context), precision))
        if needs_grad[1]:
            whole, part = weight.new_empty()
            whole.zero_()
            part.of_context.copy_(_matmul(grad.t(), rows, precision))
            result.append(whole)
    return result
