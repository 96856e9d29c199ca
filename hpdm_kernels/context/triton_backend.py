"""Multi-level context on the GPU: launches of ``triton_kernels``.

Forward: write the tables, multiply the footprints by Wc, compute ``x @ Wx.T``, and add context, coordinates and bias to
it in one kernel. Footprints are copied only for their product; the interpolation reads its tokens in place. Backward:
the transposed interpolation runs one axis after another. At relative scale 1/2 about 4 tokens per axis contribute to a
footprint token, so this reads 12 rows instead of 64. The rest is plain products on the footprints and one gathered sum
per source token.

Plain products are PyTorch's if its own setting equals ``precision``, so that ``precision`` governs every product.
Otherwise a kernel computes them; it adds ``x @ Wx.T`` to the context directly, which saves a pass over the output.
Most of the time goes to ``x @ Wx.T``, then to adding the context, which at least reads and writes the output.

Beyond its inputs the forward allocates at most the output, the projections, and a copy of the weight's columns for
tokens with aligned rows: rows of ``2D + 3`` elements would be loaded 4 bytes instead of 16 bytes at a time. The copied
footprints are freed before the output is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from hpdm_kernels._backend import resolve_precision
from hpdm_kernels._layout import dense_rows
from hpdm_kernels._triton import cdiv, launch_grid
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

_T = TypeVar("_T")

SOURCES_PER_LAUNCH = 3
"""Sources that a kernel takes at once."""
PLAN_COLUMNS = 16


class Tables(NamedTuple):
    """A :class:`Geometry` as the kernels read it (see ``triton_kernels``), and the tokens that they interpolate."""

    plan: Tensor
    """``[B, K, 16]`` int32."""
    address_table: Tensor
    """``[B, K, 4]`` int64."""
    tokens: Sequence[Tensor]
    """``K`` tensors ``[rows, n, D]`` at these addresses; they must not be freed before the kernels are launched."""

    @property
    def aligned(self) -> bool:
        """Whether every row of ``tokens`` can be loaded 16 bytes at a time."""
        return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == t.stride(1) % 16 == 0 for t in self.tokens)


def _launches(sources: Sequence[int]) -> Iterator[Sequence[int]]:
    """``sources`` in parts that one launch takes."""
    for first in range(0, len(sources), SOURCES_PER_LAUNCH):
        yield sources[first : first + SOURCES_PER_LAUNCH]


def _filled(of_sources: Sequence[_T], nothing: _T) -> list[_T]:
    """What belongs to the sources of a launch, and ``nothing`` for those that it does not have."""
    return [*of_sources, *[nothing] * (SOURCES_PER_LAUNCH - len(of_sources))]


def _tables(geometry: Geometry, tokens: Sequence[Tensor], whole: Sequence[bool] | None = None) -> Tables:
    """The tables for interpolating ``tokens``: sources ``[B_k, N_k, D]``, or footprints ``[B, P_k, D]``.

    ``whole`` tells which of them are sources; ``None``: all.
    """
    box, index = geometry.box.contiguous(), geometry.source_index
    b, count = box.shape[0], len(geometry.source_boxes)
    tokens = [dense_rows(t) for t in tokens]
    plan = torch.empty(b, count, PLAN_COLUMNS, dtype=torch.int32, device=box.device)
    address_table = torch.empty(b, count, 4, dtype=torch.int64, device=box.device)
    numbers = [
        (
            int(whole is None or whole[k]),
            t.data_ptr(),
            *t.stride()[:2],
            *geometry.source_grids[k],
            *geometry.footprints[k],
        )
        for k, t in enumerate(tokens)
    ]
    for part in _launches(range(count)):
        source_boxes = [geometry.source_boxes[k].contiguous() for k in part]
        of_sources = _filled([numbers[k] for k in part], numbers[0])
        kernels._context_geometry_kernel[launch_grid(b, len(part))](
            box, box if index is None else index.contiguous(), plan, address_table, *_filled(source_boxes, box),
            count, part[0], len(part), *geometry.grid, tokens[0].itemsize, *chain.from_iterable(of_sources),
            HAS_INDEX=index is not None, num_warps=1,
        )  # fmt: skip
    return Tables(plan, address_table, tokens)


def _gather(sources: Sequence[Tensor], chosen: Sequence[int], geometry: Geometry, plan: Tensor, out: Tensor) -> Tensor:
    """Copies the footprints of all samples in the chosen sources to ``out [sum_k B * P_k, D]``, and returns it."""
    b, count, _ = plan.shape
    d, counts, row = out.shape[1], geometry.footprint_rows, 0
    for part in _launches(chosen):
        read, sizes = [dense_rows(sources[k]) for k in part], [counts[k] // b for k in part]
        numbers = [(k, size, *t.stride()[:2]) for k, size, t in zip(part, sizes, read)]
        programs = sum(cdiv(size, ROWS.rows) for size in sizes)
        kernels._context_gather_kernel[launch_grid(programs, cdiv(d, ROWS.columns), b)](
            *_filled(read, read[0]), out[row:] if row else out, plan, b, count, d,
            *chain.from_iterable(_filled(numbers, (0, 0, *numbers[0][2:]))),
            BLOCK_T=ROWS.rows, BLOCK_D=ROWS.columns, num_warps=ROWS.num_warps,
        )  # fmt: skip
        row += b * sum(sizes)
    return out


def _scatter(
    grad: Tensor, sources: Sequence[Tensor], chosen: Sequence[int], geometry: Geometry, plan: Tensor
) -> list[Tensor]:
    """The transpose of the gather, ``grad [sum_k B * P_k, D]``: gradients ``[B_k, N_k, D]`` of the chosen sources."""
    b, count, _ = plan.shape
    d, counts, row = grad.shape[1], geometry.footprint_rows, 0
    result = []
    for part in _launches(chosen):
        outs = [sources[k].new_empty(sources[k].shape) for k in part]
        sizes = [counts[k] // b for k in part]
        numbers = [(k, *out.shape[:2], size) for k, out, size in zip(part, outs, sizes)]
        programs = sum(out.shape[0] * cdiv(out.shape[1], ROWS.rows) for out in outs)
        kernels._context_scatter_kernel[launch_grid(programs, cdiv(d, ROWS.columns))](
            grad[row:] if row else grad, *_filled(outs, outs[0]), plan, b, count, d,
            *chain.from_iterable(_filled(numbers, (0, 0, 0, 0))),
            HAS_INDEX=geometry.source_index is not None,
            BLOCK_T=ROWS.rows, BLOCK_D=ROWS.columns, num_warps=ROWS.num_warps,
        )  # fmt: skip
        row += b * sum(sizes)
        result += outs
    return result


def _contract(grad: Tensor, plan: Tensor, geometry: Geometry, chosen: Sequence[int]) -> Tensor:
    """Transposed interpolation of ``grad [B, N, D]`` (contiguous): gradients of the chosen sources' footprints.

    Returns:
        ``[sum_k B * P_k, D]``, concatenated source by source.
    """
    counts, row = geometry.footprint_rows, 0
    result = grad.new_empty(sum(counts[k] for k in chosen), grad.shape[2])
    for part in _launches(chosen):
        rows = sum(counts[k] for k in part)
        _contract_launch(grad, plan, geometry, part, result.narrow(0, row, rows))
        row += rows
    return result


def _contract_launch(grad: Tensor, plan: Tensor, geometry: Geometry, part: Sequence[int], result: Tensor) -> None:
    """:func:`_contract` for the sources of a launch: one launch per axis, which all sources share."""
    (f, h, w), (b, count, _), d = geometry.grid, plan.shape, grad.shape[2]
    value, read = grad, [0] * len(part)
    for axis, outer, n in ((2, b * f * h, w), (1, b * f, h), (0, b, f)):
        # Rows of D elements: in a token of this axis, and where the source begins in the result.
        sizes = [geometry.footprints[k][axis] for k in part]
        widths = [math.prod(geometry.footprints[k][axis + 1 :]) for k in part]
        ends = list(accumulate((outer * p * width for p, width in zip(sizes, widths)), initial=0))
        numbers = list(zip(part, sizes, widths, read, ends))
        programs = sum(cdiv(outer * p, CONTRACT.rows) * cdiv(q * d, CONTRACT.columns) for p, q in zip(sizes, widths))
        out = result if axis == 0 else result.new_empty(ends[-1], d, dtype=torch.float32)
        kernels._context_contract_kernel[launch_grid(programs)](
            value, out, plan, count, d, outer, outer // b, n, *chain.from_iterable(_filled(numbers, (0, 0, 0, 0, 0))),
            AXIS=axis, MEAN=axis == 0, BLOCK_R=CONTRACT.rows, BLOCK_D=CONTRACT.columns, num_warps=CONTRACT.num_warps,
        )  # fmt: skip
        value, read = out, ends


def _coordinate_sums(grad: Tensor, geometry: Geometry) -> Tensor:
    """``[4, D]`` fp32: sums of ``grad [B, N, D]`` over samples and tokens, weighted by the coordinates, and by 1."""
    b, n, d = grad.shape
    chunks = cdiv(n, SUMS_CHUNK)
    out = torch.empty(b, chunks, 4, d, dtype=torch.float32, device=grad.device)
    kernels._coordinate_sums_kernel[launch_grid(chunks, cdiv(d, SUMS.columns), b)](
        grad, geometry.box.contiguous(), out, n, d, *geometry.grid, SUMS_CHUNK,
        BLOCK_T=SUMS.rows, BLOCK_D=SUMS.columns, num_warps=SUMS.num_warps,
    )  # fmt: skip
    return out.sum((0, 1))


def _add_context(
    out: Tensor, tables: Tables, geometry: Geometry, coordinates: Tensor | None, bias: Tensor | None, onto: bool
) -> None:
    """Writes context, coordinates and bias to ``out [B, N, D]``; ``onto``: adds them to ``out`` instead.

    ``coordinates [3, D]`` is the weight's columns for the coordinates, contiguous.
    """
    (n_f, n_h, n_w), box, d = geometry.grid, geometry.box, out.shape[2]
    aligned = tables.aligned
    tile = add_context_tile(out.itemsize, aligned)
    blocks = cdiv(n_f * n_h, tile.lines) * cdiv(n_w, tile.tokens)
    kernels._add_context_kernel[launch_grid(blocks, cdiv(d, tile.columns), box.shape[0])](
        tables.plan, tables.address_table, box.contiguous(),
        box if coordinates is None else coordinates, box if bias is None else bias.contiguous(), out,
        len(tables.tokens), 1 / len(tables.tokens), d, n_f, n_h, n_w,
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
    blocks = cdiv(n_f * n_h, tile.lines) * cdiv(n_w, tile.tokens)
    kernels._fuse_context_fwd_kernel[launch_grid(blocks, cdiv(d, tile.columns), b)](
        x, weight, tables.plan, tables.address_table, geometry.box.contiguous(),
        weight if coordinates is None else coordinates, weight if bias is None else bias.contiguous(), out,
        len(tables.tokens), 1 / len(tables.tokens), d, n_f, n_h, n_w, x.stride(0), x.stride(1), weight.stride(0),
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
    blocks = cdiv(a.shape[0], tile.rows), cdiv(b.shape[1], tile.columns)
    kernels._context_matmul_kernel[launch_grid(*blocks)](
        a, b, out, a.shape[0], b.shape[1], a.shape[1], *a.stride(), *b.stride(), out.stride(0), PRECISION=precision,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def sample_forward(sources: Sequence[Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Mean over the sources of trilinear samples, ``[B, N, D]`` (eq. 7), and the plan for the backward."""
    n_f, n_h, n_w = geometry.grid
    out = sources[0].new_empty(geometry.box.shape[0], n_f * n_h * n_w, sources[0].shape[2])
    with torch.cuda.device_of(out):
        tables = _tables(geometry, sources)
        _add_context(out, tables, geometry, None, None, onto=False)
    return out, tables.plan


def sample_backward(
    grad: Tensor, sources: Sequence[Tensor], geometry: Geometry, plan: Tensor, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Gradients ``[B_k, N_k, D]`` of the sources that need one, from ``grad [B, N, D]``."""
    chosen, plan = [k for k, needed in enumerate(needs_grad) if needed], plan.contiguous()
    with torch.cuda.device_of(grad):
        return _scatter(_contract(grad.contiguous(), plan, geometry, chosen), sources, chosen, geometry, plan)


def fuse_forward(
    x: Tensor,
    sources: Sequence[Tensor],
    geometry: Geometry,
    weight: FusionWeight,
    bias: Tensor | None,
    projected: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """``concat[x, context, coordinates] @ weight.T + bias``, ``[B, N, D]`` (eq. 9), and the plan for the backward.

    ``projected``: the sources are.
    """
    b, n, d = x.shape
    coordinates = None if weight.of_coordinates is None else weight.of_coordinates.t().contiguous()  # [3, D]
    with torch.cuda.device_of(x):
        if projected:
            of_x, tables = _aligned_rows(weight.of_x), _tables(geometry, sources)
        else:
            of_tokens = _aligned_rows(weight.of_tokens)
            of_x, of_context = of_tokens.narrow(1, 0, d), of_tokens.narrow(1, d, d)
            tables = _project_footprints(sources, geometry, of_context.t(), precision)
        if not _pytorch_multiplies(x.dtype, precision) and tables.aligned:
            return _multiply_onto_context(x, of_x, tables, geometry, coordinates, bias, precision), tables.plan
        out = _matmul(x.reshape(-1, d), of_x.t(), precision).view(b, n, d)
        _add_context(out, tables, geometry, coordinates, bias, onto=True)
    return out, tables.plan


def _project_footprints(sources: Sequence[Tensor], geometry: Geometry, of_context: Tensor, precision: str) -> Tables:
    """Tables for the products with ``of_context``: of the footprints, or of sources if these have no more tokens."""
    b, d, counts = geometry.box.shape[0], sources[0].shape[2], geometry.footprint_rows
    source_rows = [s.shape[0] * s.shape[1] for s in sources]
    whole = [rows <= count for rows, count in zip(source_rows, counts)]
    # The products of the copied footprints come first, in one piece; those of whole sources follow.
    copied = [k for k, w in enumerate(whole) if not w]
    copied_rows = sum(counts[k] for k in copied)
    out = sources[0].new_empty(copied_rows + sum(rows for rows, w in zip(source_rows, whole) if w), d)
    tokens, ends = [], {False: 0, True: copied_rows}
    for source, rows, count, w in zip(sources, source_rows, counts, whole):
        part = out.narrow(0, ends[w], rows if w else count)
        tokens.append(part.view(source.shape if w else (b, count // b, d)))
        ends[w] += part.shape[0]
    tables = _tables(geometry, tokens, whole)
    if copied:
        # Do not bind the copies to a name: they must be freed after their product.
        _matmul(
            _gather(sources, copied, geometry, tables.plan, out.new_empty(copied_rows, d)),
            of_context, precision, out.narrow(0, 0, copied_rows),
        )  # fmt: skip
    for source, product, w in zip(sources, tokens, whole):
        if w:
            _matmul(source.reshape(-1, d), of_context, precision, product.view(-1, d))
    return tables


def fuse_backward(
    grad: Tensor,
    x: Tensor,
    sources: Sequence[Tensor],
    geometry: Geometry,
    plan: Tensor,
    weight: FusionWeight,
    needs_grad: Sequence[bool],
    projected: bool,
    precision: str,
) -> list[Tensor]:
    """Gradients of those of ``x, weight, bias, *sources`` that need one, in this order; ``grad`` is ``[B, N, D]``."""
    need_x, need_weight, need_bias, *need_sources = needs_grad
    grad, plan = grad.contiguous(), plan.contiguous()
    d = x.shape[2]
    rows = grad.view(-1, d)  # [B * N, D]
    wanted = [k for k, needed in enumerate(need_sources) if needed]
    # Sources whose footprints need a gradient: those that need one themselves, and all if the weight needs one, unless
    # the sources are projected already.
    chosen = list(range(len(sources))) if need_weight and not projected else wanted
    result = []
    with torch.cuda.device_of(x):
        if wanted and not projected:
            of_tokens = _aligned_rows(weight.of_tokens)
            of_x, of_context = of_tokens.narrow(1, 0, d), of_tokens.narrow(1, d, d)
        else:
            of_x = _aligned_rows(weight.of_x) if need_x else weight.of_x
        if need_x:
            result.append(_matmul(rows, of_x, precision).view(x.shape))
        if not any(needs_grad[1:]):
            return result
        need_coordinates = need_weight and weight.of_coordinates is not None
        sums = _coordinate_sums(grad, geometry) if need_bias or need_coordinates else rows[:0]  # [4, D]
        context_grad = _contract(grad, plan, geometry, chosen)  # [sum_k B * P_k, D]
        if need_weight:
            whole, part = weight.new_empty()
            part.of_x.copy_(_matmul(rows.t(), x.reshape(rows.shape), precision))
            if projected:
                part.of_context.zero_()
            else:
                tokens = _gather(sources, chosen, geometry, plan, x.new_empty(context_grad.shape))
                part.of_context.copy_(_matmul(context_grad.t(), tokens, precision))
            if part.of_coordinates is not None:
                part.of_coordinates.copy_(sums[:3].t())
            result.append(whole)
        if need_bias:
            result.append(sums[3].to(x.dtype, copy=True))
        if wanted:
            source_grad = _rows_of(context_grad, wanted, chosen, geometry)
            if not projected:
                source_grad = _matmul(source_grad, of_context, precision)
            result += _scatter(source_grad, sources, wanted, geometry, plan)
    return result


def _rows_of(rows: Tensor, wanted: Sequence[int], chosen: Sequence[int], geometry: Geometry) -> Tensor:
    """The rows of the wanted sources among those of the chosen ones, ``[sum_k B * P_k, D]``."""
    if len(wanted) == len(chosen):
        return rows
    parts = dict(zip(chosen, rows.split([geometry.footprint_rows[k] for k in chosen])))
    return torch.cat([parts[k] for k in wanted])


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
