"""Launches the kernels of ``context_kernels``: multi-level context on the GPU.

Forward: tables, footprints, their product with Wc, then one kernel that takes ``x @ Wx.T`` and adds the 8 corners of
every source, the coordinates and the bias before it writes. Backward: the transposed interpolation runs one axis after
the other (at relative scale 1/2 a footprint token has about 4 contributors per axis: 12 rows read instead of 64), all
else is plain products on the footprint and one gathered sum per source token. Plain products are PyTorch's where its
own setting is the precision asked for, so that ``precision`` governs every product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpdm_kernels import _backend
from hpdm_kernels import context_kernels as kernels
from hpdm_kernels._triton import INTERPRETED, KernelSpec, triton

Triple = Sequence[int]


class Tile(NamedTuple):
    """A block of rows and columns, and for products the inner size, with its launch options."""

    rows: int
    columns: int
    inner: int = 0
    num_warps: int = 4
    num_stages: int = 2


# The interpreter pays per program and operation, not per element: it gets blocks that hold everything a test has.
_ROWS = Tile(256, 64) if INTERPRETED else Tile(8, 256)
_CONTRACT = Tile(256, 64) if INTERPRETED else Tile(4, 256)
_SUMS = Tile(256, 64) if INTERPRETED else Tile(16, 128)
_SAMPLE = Tile(256, 64) if INTERPRETED else Tile(8, 128)
_CHUNK = 256  # tokens per partial sum of the coordinates' gradient
_PRODUCT = {
    "ieee": Tile(64, 64, 16, 8, 2),
    "tf32x3": Tile(64, 64, 16, 8, 2),
    "tf32": Tile(128, 64, 32, 8, 3),
    "16bit": Tile(128, 64, 64, 8, 3),
}


def _product_tile(dtype: torch.dtype, precision: str) -> Tile:
    return Tile(128, 64, 64) if INTERPRETED else _PRODUCT[precision if dtype is torch.float32 else "16bit"]


class Plan(NamedTuple):
    """The tables, and where each source's footprints lie in a buffer ``[sum_k B * P_k, D]``."""

    place: Tensor
    where: Tensor
    sizes: Sequence[Triple]
    counts: list[int]
    """``B * P_k``."""


def _plan(
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
) -> Plan:
    b, count = box.shape[0], len(source_boxes)
    place = torch.empty(b, count, 10, dtype=torch.int32, device=box.device)
    where = torch.empty(b, count, 6, dtype=torch.float32, device=box.device)
    index = box if source_index is None else source_index.contiguous()
    for k, source_box in enumerate(source_boxes):
        kernels._context_geometry_kernel[(b,)](
            box.contiguous(), source_box.contiguous(), index, place, where, k, count,
            *grid, *source_grids[k], *sizes[k],
            HAS_INDEX=source_index is not None, num_warps=1,
        )  # fmt: skip
    return Plan(place, where, sizes, [b * p[0] * p[1] * p[2] for p in sizes])


def _dense_rows(x: Tensor) -> Tensor:
    """The kernels read rows of adjacent elements."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _gather(sources: Sequence[Tensor], plan: Plan) -> Tensor:
    """Footprints of all sources and samples, ``[sum_k B * P_k, D]``."""
    b, count, _ = plan.where.shape
    d = sources[0].shape[2]
    out = sources[0].new_empty(sum(plan.counts), d)
    for k, (source, rows) in enumerate(zip(map(_dense_rows, sources), out.split(plan.counts))):
        p = plan.counts[k] // b
        if p * d >= 2**31:
            raise ValueError(
                f"footprints[{k}]: got {tuple(plan.sizes[k])} tokens of {d}, expected fewer than 2**31 elements"
            )
        kernels._context_gather_kernel[(triton.cdiv(p, _ROWS.rows), b, triton.cdiv(d, _ROWS.columns))](
            source, rows, plan.place, k, count, p, d, source.stride(0), source.stride(1),
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


def _matmul(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """``a @ b``; PyTorch's where that takes the product as asked. ``out`` has adjacent columns."""
    if a.dtype is not torch.float32 or precision == _backend.resolve_precision(None):
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    tile = _product_tile(a.dtype, precision)
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
    b, n, d = box.shape[0], grid[0] * grid[1] * grid[2], sources[0].shape[2]
    out = sources[0].new_empty(b, n, d)
    with torch.cuda.device_of(out):
        plan = _plan(source_boxes, box, source_index, source_grids, grid, sizes)
        kernels._sample_context_fwd_kernel[(triton.cdiv(n, _SAMPLE.rows), b, triton.cdiv(d, _SAMPLE.columns))](
            _gather(sources, plan), plan.where, plan.place, out, b, len(sources), n, d, grid[1], grid[2],
            BLOCK_T=_SAMPLE.rows, BLOCK_D=_SAMPLE.columns, num_warps=_SAMPLE.num_warps,
        )  # fmt: skip
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
        plan = _plan(source_boxes, box, source_index, source_grids, grid, sizes)
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
) -> Tensor:
    """``concat[x, context, coordinates] @ weight.T + bias``, ``[B, N, D]``."""
    b, n, d = x.shape
    with_coordinates = weight.shape[1] == 2 * d + 3
    out = x.new_empty(b, n, d)
    with torch.cuda.device_of(x):
        plan = _plan(source_boxes, box, source_index, source_grids, grid, sizes)
        projected = _matmul(_gather(sources, plan), weight[:, d : 2 * d].t(), precision)
        # Rows of 2D + 3 elements are not aligned: packed, the kernel can load 16 bytes at a time.
        packed = weight[:, :d].contiguous()
        coordinates = weight[:, 2 * d :].contiguous() if with_coordinates else packed
        x = _dense_rows(x)
        tile = _product_tile(x.dtype, precision)
        kernels._fuse_context_fwd_kernel[(triton.cdiv(n, tile.rows) * triton.cdiv(d, tile.columns), b)](
            x, packed, projected, plan.where, plan.place, box.contiguous(), coordinates,
            packed if bias is None else bias.contiguous(), out,
            b, len(sources), n, d, *grid, x.stride(0), x.stride(1),
            HAS_BIAS=bias is not None, HAS_COORDINATES=with_coordinates, PRECISION=precision,
            BLOCK_T=tile.rows, BLOCK_D=tile.columns, BLOCK_K=tile.inner,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


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
) -> list[Tensor]:
    """Gradients of those of ``x, weight, bias, *sources`` that are wanted, in this order."""
    d = x.shape[2]
    want_x, want_weight, want_bias, *want_sources = wanted
    with_coordinates = want_weight and weight.shape[1] == 2 * d + 3
    chosen = [k for k, want in enumerate(want_sources) if want or want_weight]
    grad = grad.contiguous()
    rows = grad.view(-1, d)
    result = []
    with torch.cuda.device_of(x):
        if want_x:
            result.append(_matmul(rows, weight[:, :d], precision).view(x.shape))
        plan = _plan(source_boxes, box, source_index, source_grids, grid, sizes)
        projected_grad = _contract(grad, plan, grid, chosen) if chosen else rows[:0]
        sums = _coordinate_sums(grad, box, grid) if want_bias or with_coordinates else None
        if want_weight:
            grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
            _matmul(rows.t(), x.reshape(-1, d), precision, grad_weight[:, :d])
            _matmul(projected_grad.t(), _gather(sources, plan), precision, grad_weight[:, d : 2 * d])
            if with_coordinates and sums is not None:
                grad_weight[:, 2 * d :] = sums[:3].t()
            result.append(grad_weight)
        if want_bias and sums is not None:
            result.append(sums[3].to(x.dtype, copy=True))
        for k, g in zip(chosen, projected_grad.split([plan.counts[k] for k in chosen])):
            if want_sources[k]:
                source_grad = _matmul(g, weight[:, d : 2 * d], precision)
                result.append(_scatter(source_grad, k, sources[k], plan, source_index is not None))
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
    for index in ("none", "i32", "i64"):
        types = {"index_ptr": "*fp32" if index == "none" else f"*{index}"}
        tile = Tile(0, 0, num_warps=1)
        specs.append(_spec("context_geometry", index, "fp32", {"HAS_INDEX": index != "none"}, tile, types))
    for dtype in ("fp32", "bf16", "fp16"):
        rows = {"BLOCK_T": _ROWS.rows, "BLOCK_D": _ROWS.columns}
        specs.append(_spec("context_gather", dtype, dtype, rows, _ROWS))
        for flag in (False, True):
            specs.append(_spec("context_scatter", f"{dtype},index={flag}", dtype, {"HAS_INDEX": flag, **rows}, _ROWS))
        blocks = {"BLOCK_T": _SAMPLE.rows, "BLOCK_D": _SAMPLE.columns}
        specs.append(_spec("sample_context_fwd", dtype, dtype, blocks, _SAMPLE))
        blocks = {"BLOCK_T": _SUMS.rows, "BLOCK_D": _SUMS.columns}
        specs.append(_spec("coordinate_sums", dtype, dtype, blocks, _SUMS, {"out_ptr": "*fp32"}))
        for axis in range(3):
            constants = {"AXIS": axis, "MEAN": axis == 0, "BLOCK_R": _CONTRACT.rows, "BLOCK_D": _CONTRACT.columns}
            # Width comes first and reads the gradient, frames come last and write it; in between it is fp32.
            types = {"grad_ptr": f"*{dtype}" if axis == 2 else "*fp32", "out_ptr": "*fp32" if axis else f"*{dtype}"}
            specs.append(_spec("context_contract", f"{dtype},axis{axis}", dtype, constants, _CONTRACT, types))
    products = [("fp32", "ieee"), ("fp32", "tf32x3"), ("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")]
    for dtype, precision in products:
        tile = _PRODUCT[precision if dtype == "fp32" else "16bit"]
        inner = {"PRECISION": precision, "BLOCK_K": tile.inner}
        if dtype == "fp32":
            blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.columns}
            specs.append(_spec("context_matmul", precision, dtype, {**inner, **blocks}, tile))
        for flag in (False, True):
            blocks = {"BLOCK_T": tile.rows, "BLOCK_D": tile.columns, "HAS_BIAS": flag, "HAS_COORDINATES": flag}
            label = f"{dtype},{precision},{'extras' if flag else 'plain'}"
            specs.append(_spec("fuse_context_fwd", label, dtype, {**inner, **blocks}, tile))
    return specs


def _spec(
    kernel: str, label: str, dtype: str, constexprs: dict[str, Any], tile: Tile, types: dict[str, str] | None = None
) -> KernelSpec:
    fn = getattr(kernels, f"_{kernel}_kernel")
    known = {"place_ptr": "*i32", "where_ptr": "*fp32", "box_ptr": "*fp32", "source_box_ptr": "*fp32", **(types or {})}
    signature = {}
    for name in fn.arg_names:
        default = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constexprs else known.get(name, default)
    aligned = tuple(
        n for n in signature if n.endswith("_ptr") or n in ("D", "width") or n.startswith(("stride_x", "stride_source"))
    )
    return KernelSpec(f"{kernel}[{label}]", fn, signature, constexprs, tile.num_warps, tile.num_stages, aligned)
