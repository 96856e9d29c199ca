"""Launches the kernels of ``context_kernels``: multi-level context on the GPU.

Forward: tables, the product of the footprints with Wc, ``x @ Wx.T``, and one kernel that adds context, coordinates and
bias to it. Footprints are copied for their product alone; what is interpolated is read where it lies. Backward: the
transposed interpolation runs one axis after the other (at relative scale 1/2 a footprint token has about 4
contributors per axis: 12 rows read instead of 64), all else is plain products on the footprint and one gathered sum per
source token.

Plain products are PyTorch's where its own setting is the precision asked for, so that ``precision`` governs every
product; else they are a kernel's, which takes ``x @ Wx.T`` on top of the context and saves a pass over the output.
Predicted for one H200 (4.1 TB/s of copies, 400 TFLOP/s of TF32, not measured), eight UCF patches of 16^3 tokens of 1024
with two sources: 172 us for ``x @ Wx.T``, 51 us for the footprints' product, 75 us for adding the context, whose floor
is the output read and written.

Beyond its inputs the forward holds at most the output, the projections, and a copy of Wx with aligned rows: rows of
``2D + 3`` elements would be loaded 4 bytes at a time, four times the loads of the product's right side. The footprints
of one source lie beside the projections only before the output does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpdm_kernels import _backend
from hpdm_kernels._triton import INTERPRETED, KernelSpec, triton
from hpdm_kernels.context import triton_kernels as kernels

Triple = Sequence[int]


class Tile(NamedTuple):
    """A block of rows and columns, and for products the inner size, with its launch options."""

    rows: int
    columns: int
    inner: int = 0
    num_warps: int = 4
    num_stages: int = 2


class ContextTile(NamedTuple):
    """A block of lines of tokens, tokens of each line and columns, and for products the inner size."""

    lines: int
    tokens: int
    columns: int
    inner: int = 0
    num_warps: int = 8
    num_stages: int = 2

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_L": self.lines, "BLOCK_W": self.tokens, "BLOCK_D": self.columns}


# The interpreter pays per program and operation, not per element: it gets blocks that hold everything a test has.
_ROWS = Tile(256, 64) if INTERPRETED else Tile(8, 256)
_CONTRACT = Tile(256, 64) if INTERPRETED else Tile(4, 256)
_SUMS = Tile(256, 64) if INTERPRETED else Tile(16, 128)
_CHUNK = 256  # tokens per partial sum of the coordinates' gradient
_INTERPRETED_TILE = ContextTile(32, 8, 64, 64)
# By bytes of an element, and whether rows are aligned. A thread loads 16 bytes of a row, and 64 tokens share their rows
# in the first cache: at scales 1/2 and 1/4 a token costs 5 rows from there (fp32), but 1.6 from the second. About 100
# registers leave room for 16 warps with 2 KB in flight each, as much as the latency of memory at full rate takes.
_ADD = {
    (4, True): ContextTile(8, 8, 128),
    (2, True): ContextTile(16, 4, 128),
    # Where a thread loads single elements, larger tiles spill registers.
    (4, False): ContextTile(8, 8, 64),
    (2, False): ContextTile(8, 8, 64),
}
# 128 by 128, since a product moves (1/M + 1/N) / 2 elements per multiplication through the second cache.
_FUSE = {
    "ieee": ContextTile(8, 8, 128, 16),
    "tf32x3": ContextTile(16, 8, 128, 16),
    "tf32": ContextTile(16, 8, 128, 32, num_stages=3),
}
# Narrower: gradients of the weight have 64 tiles of 128 by 128 at D = 1024, for 132 multiprocessors.
_PRODUCT = {
    "ieee": Tile(64, 64, 16, 8, 2),
    "tf32x3": Tile(128, 64, 16, 8, 2),
    "tf32": Tile(128, 64, 32, 8, 3),
}


class Plan(NamedTuple):
    """The tables, where each source's footprints lie in a buffer ``[sum_k B * P_k, D]``, and what is interpolated."""

    place: Tensor
    where: Tensor
    values: Tensor
    sizes: Sequence[Triple]
    counts: list[int]
    """``B * P_k``."""
    tokens: Sequence[Tensor]
    """``[rows, n, D]`` each; ``values`` holds their addresses, so they must live until the kernels are launched."""

    @property
    def aligned(self) -> bool:
        """Whether every row of ``tokens`` can be loaded 16 bytes at a time."""
        return all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == t.stride(1) % 16 == 0 for t in self.tokens)


def _plan(
    tokens: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
    whole: Sequence[bool] | None = None,
) -> Plan:
    """The tables for interpolating ``tokens``: rows of sources, or where not ``whole`` footprints ``[B, P_k, D]``."""
    b, count = box.shape[0], len(source_boxes)
    tokens = [_dense_rows(t) for t in tokens]
    place = torch.empty(b, count, 10, dtype=torch.int32, device=box.device)
    where = torch.empty(b, count, 6, dtype=torch.float32, device=box.device)
    values = torch.empty(b, count, 4, dtype=torch.int64, device=box.device)
    index = box if source_index is None else source_index.contiguous()
    for k, (source_box, t) in enumerate(zip(source_boxes, tokens)):
        kernels._context_geometry_kernel[(b,)](
            box.contiguous(), source_box.contiguous(), index, place, where, values, k, count,
            *grid, *source_grids[k], *sizes[k], t.data_ptr(), t.stride(0), t.stride(1), t.itemsize,
            HAS_INDEX=source_index is not None, WHOLE=whole is None or whole[k], num_warps=1,
        )  # fmt: skip
    return Plan(place, where, values, sizes, [b * p[0] * p[1] * p[2] for p in sizes], tokens)


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels read rows of adjacent elements."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _gather(source: Tensor, k: int, plan: Plan, out: Tensor) -> Tensor:
    """Footprints of all samples in source k, ``out [B * P_k, D]``."""
    b, count, _ = plan.where.shape
    d, p = source.shape[2], plan.counts[k] // b
    source = _dense_rows(source)
    kernels._context_gather_kernel[(triton.cdiv(p, _ROWS.rows), b, triton.cdiv(d, _ROWS.columns))](
        source, out, plan.place, k, count, p, d, source.stride(0), source.stride(1),
        BLOCK_T=_ROWS.rows, BLOCK_D=_ROWS.columns, num_warps=_ROWS.num_warps,
    )  # fmt: skip
    return out


def _scatter(grads: Tensor, k: int, source: Tensor, plan: Plan, with_index: bool) -> Tensor:
    b, count, _ = plan.where.shape
    rows, n, d = source.shape
    out = source.new_empty(rows, n, d)
    kernels._context_scatter_kernel[(triton.cdiv(n, _ROWS.rows), rows, triton.cdiv(d, _ROWS.columns))](
        grads, out, plan.place, k, count, b, n, plan.counts[k] // b, d,
        HAS_INDEX=with_index, BLOCK_T=_ROWS.rows, BLOCK_D=_ROWS.columns, num_warps=_ROWS.num_warps,
    )  # fmt: skip
    return out


def _contract(grad: Tensor, plan: Plan, grid: Triple, chosen: Sequence[int]) -> Tensor:
    """Gradient of the footprints of the chosen sources below each other, from ``grad [B, N, D]``, contiguous."""
    (b, count, _), d = plan.where.shape, grad.shape[2]
    result = grad.new_empty(sum(plan.counts[k] for k in chosen), d)
    for k, last in zip(chosen, result.split([plan.counts[k] for k in chosen])):
        (f, h, w), (pf, ph, pw) = grid, plan.sizes[k]
        value = grad
        for axis, per_sample, n, p, width in ((2, f * h, w, pw, d), (1, f, h, ph, pw * d), (0, 1, f, pf, ph * pw * d)):
            rows = b * per_sample * p
            out = last if axis == 0 else value.new_empty(rows, width, dtype=torch.float32)
            kernels._context_contract_kernel[
                (triton.cdiv(rows, _CONTRACT.rows), triton.cdiv(width, _CONTRACT.columns))
            ](
                value, out, plan.where, k, count, rows, per_sample, n, p, width, AXIS=axis, MEAN=axis == 0,
                BLOCK_R=_CONTRACT.rows, BLOCK_D=_CONTRACT.columns, num_warps=_CONTRACT.num_warps,
            )  # fmt: skip
            value = out
    return result


def _add_context(
    out: Tensor, plan: Plan, box: Tensor, grid: Triple, coordinates: Tensor | None, bias: Tensor | None, onto: bool
) -> None:
    """Writes the context to ``out [B, N, D]``, or adds it ``onto`` what is there, with coordinates and bias."""
    d, aligned = out.shape[2], plan.aligned
    tile = _INTERPRETED_TILE if INTERPRETED else _ADD[out.itemsize, aligned]
    blocks = triton.cdiv(grid[0] * grid[1], tile.lines) * triton.cdiv(grid[2], tile.tokens)
    kernels._add_context_kernel[(blocks, box.shape[0], triton.cdiv(d, tile.columns))](
        plan.where, plan.place, plan.values, box.contiguous(), box if coordinates is None else coordinates,
        box if bias is None else bias.contiguous(), out, len(plan.tokens), d, *grid,
        ONTO=onto, HAS_BIAS=bias is not None, HAS_COORDINATES=coordinates is not None, ALIGNED=aligned,
        **tile.blocks, num_warps=tile.num_warps,
    )  # fmt: skip


def _is_pytorchs(dtype: torch.dtype, precision: str) -> bool:
    """Whether PyTorch takes products of ``dtype`` in ``precision`` by its own setting."""
    return dtype is not torch.float32 or precision == _backend.resolve_precision(None)


def _packed(columns: Tensor) -> Tensor:
    """Columns of a weight with aligned rows, which rows of ``2D + 3`` elements are not."""
    aligned = columns.stride(1) == 1 and columns.stride(0) * columns.itemsize % 16 == columns.data_ptr() % 16 == 0
    return columns if aligned else columns.contiguous()


def _matmul(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """``a @ b``. ``out`` has adjacent columns."""
    if _is_pytorchs(a.dtype, precision):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    if precision == "tf32" and b.stride(0) != 1 and b.numel() < a.numel():
        # Hopper takes TF32 with the inner dimension adjacent; turned while loading, it would go 4 bytes at a time.
        b = b.t().contiguous().t()
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    tile = Tile(128, 64, 64) if INTERPRETED else _PRODUCT[precision]
    kernels._context_matmul_kernel[(triton.cdiv(a.shape[0], tile.rows), triton.cdiv(b.shape[1], tile.columns))](
        a, b, out, a.shape[0], b.shape[1], a.shape[1], *a.stride(), *b.stride(), out.stride(0), PRECISION=precision,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.inner,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def sample_forward(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
) -> Tensor:
    """Mean over the sources of trilinear samples, ``[B, N, D]``."""
    out = sources[0].new_empty(box.shape[0], grid[0] * grid[1] * grid[2], sources[0].shape[2])
    with torch.cuda.device_of(out):
        plan = _plan(sources, source_boxes, box, source_index, source_grids, grid, sizes)
        _add_context(out, plan, box, grid, None, None, onto=False)
    return out


def sample_backward(
    grad: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the wanted sources."""
    chosen = [k for k, want in enumerate(wanted) if want]
    with torch.cuda.device_of(grad):
        plan = _plan(sources, source_boxes, box, source_index, source_grids, grid, sizes)
        grads = _contract(grad.contiguous(), plan, grid, chosen).split([plan.counts[k] for k in chosen])
        return [_scatter(g, k, sources[k], plan, source_index is not None) for k, g in zip(chosen, grads)]


def fuse_forward(
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
    precision: str,
    projected: bool = False,
) -> Tensor:
    """``concat[x, context, coordinates] @ weight.T + bias``, ``[B, N, D]``; sources may be projected already."""
    b, n, d = x.shape
    geometry = (source_boxes, box, source_index, source_grids, grid, sizes)
    coordinates = weight[:, 2 * d :].contiguous() if weight.shape[1] == 2 * d + 3 else None
    with torch.cuda.device_of(x):
        plan = _plan(sources, *geometry) if projected else _project_footprints(sources, *geometry, weight, precision)
        of_x = _packed(weight[:, :d])
        if _is_pytorchs(x.dtype, precision) or not plan.aligned:
            out = _matmul(x.reshape(-1, d), of_x.t(), precision).view(b, n, d)
            _add_context(out, plan, box, grid, coordinates, bias, onto=True)
            return out
        out, x = x.new_empty(b, n, d), _dense_rows(x)
        tile = _INTERPRETED_TILE if INTERPRETED else _FUSE[precision]
        blocks = triton.cdiv(grid[0] * grid[1], tile.lines) * triton.cdiv(grid[2], tile.tokens)
        kernels._fuse_context_fwd_kernel[(blocks * triton.cdiv(d, tile.columns), b)](
            x, of_x, plan.where, plan.place, plan.values, box.contiguous(),
            of_x if coordinates is None else coordinates, of_x if bias is None else bias.contiguous(), out,
            len(sources), d, *grid, x.stride(0), x.stride(1), of_x.stride(0),
            HAS_BIAS=bias is not None, HAS_COORDINATES=coordinates is not None, PRECISION=precision,
            **tile.blocks, BLOCK_K=tile.inner, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _project_footprints(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
    weight: Tensor,
    precision: str,
) -> Plan:
    """A plan of the footprints' products with Wc, or of whole sources' where these have no more tokens."""
    d, counts = sources[0].shape[2], [box.shape[0] * p[0] * p[1] * p[2] for p in sizes]
    whole = [s.shape[0] * s.shape[1] <= count for s, count in zip(sources, counts)]
    shapes = [s.shape if w else (box.shape[0], c // box.shape[0], d) for s, w, c in zip(sources, whole, counts)]
    tokens = [s.new_empty(shape) for s, shape in zip(sources, shapes)]
    plan = _plan(tokens, source_boxes, box, source_index, source_grids, grid, sizes, whole)
    of_context = _packed(weight[:, d : 2 * d]).t()
    for k, (source, out) in enumerate(zip(sources, tokens)):
        # Nothing keeps the copy of a footprint beyond its product.
        _matmul(
            source.reshape(-1, d) if whole[k] else _gather(source, k, plan, source.new_empty(counts[k], d)),
            of_context, precision, out.view(-1, d),
        )  # fmt: skip
    return plan


def fuse_backward(
    grad: Tensor,
    x: Tensor,
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
    wanted: Sequence[bool],
    precision: str,
    projected: bool = False,
) -> list[Tensor]:
    """Gradients of those of ``x, weight, bias, *sources`` that are wanted, in this order."""
    d = x.shape[2]
    want_x, want_weight, want_bias, *want_sources = wanted
    with_coordinates = want_weight and weight.shape[1] == 2 * d + 3
    # The weight needs every source's context gradient, unless they were projected before; the sources their own.
    chosen = [k for k, want in enumerate(want_sources) if want or (want_weight and not projected)]
    grad = grad.contiguous()
    rows = grad.view(-1, d)
    result = []
    with torch.cuda.device_of(x):
        if want_x:
            result.append(_matmul(rows, _packed(weight[:, :d]), precision).view(x.shape))
        plan = _plan(sources, source_boxes, box, source_index, source_grids, grid, sizes)
        counts = [plan.counts[k] for k in chosen]
        context_grad = _contract(grad, plan, grid, chosen) if chosen else rows[:0]
        sums = _coordinate_sums(grad, box, grid) if want_bias or with_coordinates else None
        if want_weight:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            grad_weight[:, :d] = _matmul(rows.t(), x.reshape(-1, d), precision)
            if projected:
                grad_weight[:, d : 2 * d] = 0
            else:
                footprints = x.new_empty(sum(counts), d)
                for k, part in zip(chosen, footprints.split(counts)):
                    _gather(sources[k], k, plan, part)
                grad_weight[:, d : 2 * d] = _matmul(context_grad.t(), footprints, precision)
            if with_coordinates and sums is not None:
                grad_weight[:, 2 * d :] = sums[:3].t()
            result.append(grad_weight)
        if want_bias and sums is not None:
            result.append(sums[3].to(x.dtype, copy=True))
        for k, g in zip(chosen, context_grad.split(counts)):
            if want_sources[k]:
                source_grad = g if projected else _matmul(g, _packed(weight[:, d : 2 * d]), precision)
                result.append(_scatter(source_grad, k, sources[k], plan, source_index is not None))
    return result


def project(rows: Tensor, weight: Tensor, precision: str) -> Tensor:
    """``rows [R, D]`` through the context columns of ``weight``."""
    d = rows.shape[1]
    with torch.cuda.device_of(rows):
        return _matmul(rows, _packed(weight[:, d : 2 * d]).t(), precision)


def project_backward(
    grad: Tensor, rows: Tensor, weight: Tensor, wanted: Sequence[bool], precision: str
) -> list[Tensor]:
    """Gradients of those of ``rows`` and ``weight`` that are wanted."""
    d = rows.shape[1]
    result = []
    with torch.cuda.device_of(rows):
        if wanted[0]:
            result.append(_matmul(grad, _packed(weight[:, d : 2 * d]), precision))
        if wanted[1]:
            grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            grad_weight[:, d : 2 * d] = _matmul(grad.t(), rows, precision)
            result.append(grad_weight)
    return result


def _coordinate_sums(grad: Tensor, box: Tensor, grid: Triple) -> Tensor:
    """``[4, D]`` fp32: grad times the coordinates f, h, w, and grad, summed over tokens and samples."""
    b, n, d = grad.shape
    chunks = triton.cdiv(n, _CHUNK)
    out = torch.empty(b, chunks, 4, d, dtype=torch.float32, device=grad.device)
    kernels._coordinate_sums_kernel[(chunks, b, triton.cdiv(d, _SUMS.columns))](
        grad, box.contiguous(), out, n, d, *grid, _CHUNK,
        BLOCK_T=_SUMS.rows, BLOCK_D=_SUMS.columns, num_warps=_SUMS.num_warps,
    )  # fmt: skip
    return out.sum((0, 1))


# ---- ahead-of-time compilation ----


def aot_specs() -> list[KernelSpec]:
    """Every kernel, dtype and entry of the tables above."""
    specs = []
    for index, whole in itertools.product(("none", "i32", "i64"), (False, True)):
        types = {"index_ptr": "*fp32" if index == "none" else f"*{index}"}
        constants: dict[str, Any] = {"HAS_INDEX": index != "none", "WHOLE": whole}
        label = f"{index},{'source' if whole else 'footprint'}"
        specs.append(_spec("context_geometry", label, "fp32", constants, Tile(0, 0, num_warps=1), types))
    for dtype in ("fp32", "bf16", "fp16"):
        rows = {"BLOCK_T": _ROWS.rows, "BLOCK_D": _ROWS.columns}
        specs.append(_spec("context_gather", dtype, dtype, rows, _ROWS))
        for flag in (False, True):
            specs.append(_spec("context_scatter", f"{dtype},index={flag}", dtype, {"HAS_INDEX": flag, **rows}, _ROWS))
        for aligned, flag in itertools.product((True, False), repeat=2):
            tile = _ADD[4 if dtype == "fp32" else 2, aligned]
            constants = {"ONTO": flag, "HAS_BIAS": flag, "HAS_COORDINATES": flag, "ALIGNED": aligned, **tile.blocks}
            label = f"{dtype},{'onto' if flag else 'alone'},{'aligned' if aligned else 'any'}"
            specs.append(_spec("add_context", label, dtype, constants, tile, aligned=aligned))
        blocks = {"BLOCK_T": _SUMS.rows, "BLOCK_D": _SUMS.columns}
        specs.append(_spec("coordinate_sums", dtype, dtype, blocks, _SUMS, {"out_ptr": "*fp32"}))
        for axis in range(3):
            constants = {"AXIS": axis, "MEAN": axis == 0, "BLOCK_R": _CONTRACT.rows, "BLOCK_D": _CONTRACT.columns}
            # Width comes first and reads the gradient, frames come last and write it; in between it is fp32.
            types = {"grad_ptr": f"*{dtype}" if axis == 2 else "*fp32", "out_ptr": "*fp32" if axis else f"*{dtype}"}
            specs.append(_spec("context_contract", f"{dtype},axis{axis}", dtype, constants, _CONTRACT, types))
    # As launched: of each operand one dimension is adjacent. Rows by a turned weight, by a weight, turned rows by rows.
    adjacent = {
        "nt": ("stride_a_k", "stride_b_k"),
        "nn": ("stride_a_k", "stride_b_n"),
        "tn": ("stride_a_m", "stride_b_n"),
    }
    for precision in _backend.PRECISIONS:
        product = _PRODUCT[precision]
        blocks = {"BLOCK_M": product.rows, "BLOCK_N": product.columns, "BLOCK_K": product.inner}
        for layout, ones in adjacent.items():
            constants = {"PRECISION": precision, **dict.fromkeys(ones, 1), **blocks}
            specs.append(_spec("context_matmul", f"{precision},{layout}", "fp32", constants, product))
        tile = _FUSE[precision]
        for flag in (False, True):
            constants = {"HAS_BIAS": flag, "HAS_COORDINATES": flag, "PRECISION": precision, "BLOCK_K": tile.inner}
            label = f"{precision},{'extras' if flag else 'plain'}"
            specs.append(_spec("fuse_context_fwd", label, "fp32", {**constants, **tile.blocks}, tile))
    return specs


_TYPES = {
    "place_ptr": "*i32",
    "where_ptr": "*fp32",
    "values_ptr": "*i64",
    "box_ptr": "*fp32",
    "source_box_ptr": "*fp32",
    "address": "i64",
}


def _spec(
    kernel: str,
    label: str,
    dtype: str,
    constexprs: dict[str, Any],
    tile: Tile | ContextTile,
    types: dict[str, str] | None = None,
    aligned: bool = True,
) -> KernelSpec:
    fn = getattr(kernels, f"_{kernel}_kernel")
    signature = {}
    for name in fn.arg_names:
        default = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constexprs else {**_TYPES, **(types or {})}.get(name, default)
    even = ("D", "width", *(("M", "N", "K") if kernel == "context_matmul" else ()))
    hints = tuple(
        name
        for name, kind in signature.items()
        if kind.startswith("*") or (aligned and kind != "constexpr" and (name in even or name.startswith("stride_")))
    )
    return KernelSpec(f"{kernel}[{label}]", fn, signature, constexprs, tile.num_warps, tile.num_stages, hints)
