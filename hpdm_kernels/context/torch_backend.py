"""Multi-level context in portable PyTorch: three small matrix products per source instead of 8-corner gathers.

A source's footprint ``[pf, ph, pw, D]`` is expanded one axis at a time by hat matrices (``context_geometry``): frames,
height, and last width, whose product adds to the output in place. In the backward the width comes first, for all
sources in one product that reads the gradient once. The mean over sources is folded into the width's matrix. For
``fuse_context`` two more columns carry the coordinates and the bias, which are separable as well:

    out[f, h] = x[f, h] @ Wx.T + sum_k W_k @ T_k[f, h] + [c_w, 1] @ [v_w, b + c_f v_f + c_h v_h]

with ``W_k`` the ``[n_w, pw_k]`` hat matrices and ``v`` the coordinate columns of the weight. Bytes moved beyond the
plain product ``x @ Wx.T``: the output read and written once per source, ``T_k`` (``pw_k / n_w`` of the output, a few
frames at a time) written and read, and the footprints. Memory beyond the inputs is at most the output, the projections
of the footprints, and ``SCRATCH``. Writing all ``T_k`` into one buffer would save passes over the output, but its
strided products cost a thread barrier per line. 16-bit data is interpolated in fp32. Products follow torch's own
precision settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels.context import geometry
from hpdm_kernels.reference import axis_positions, coordinate_dtype

Triple = Sequence[int]

SCRATCH, SCRATCH_LARGE = 1 << 18, 1 << 22
"""Elements between footprints and patch at a time. In the forward of the fusion 1 MB in fp32, which costs 4 % against
no limit and is small beside any output; elsewhere 16 MB, below what the C library takes from the system, and gives
back, every time."""


class Footprint(NamedTuple):
    """What one source contributes: which of its tokens, and the hat matrices that spread them over the patch."""

    size: Triple
    tokens: Tensor
    """``[B, P]`` numbers of the tokens in the source flattened to ``[B_k * N_k, D]``."""
    matrices: tuple[Tensor, Tensor, Tensor]
    """``[B, n, p]`` for frames, height and width."""


def _footprints(
    sources: Sequence[Tensor],
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_index: Tensor | None,
    source_grids: Sequence[Triple],
    grid: Triple,
    sizes: Sequence[Triple],
) -> list[Footprint]:
    work = coordinate_dtype(sources[0].dtype)
    result = []
    for k, (source_box, source_grid, size) in enumerate(zip(source_boxes, source_grids, sizes)):
        rows = None if source_index is None else source_index[:, k]
        source_box = source_box if rows is None else source_box[rows]
        positions = geometry.axis_positions(box, source_box, grid, source_grid)
        starts = [geometry.footprint_start(positions, a, size[a], source_grid[a]) for a in range(3)]
        f, h, w = (geometry.hat_matrix(positions, starts[a], a, grid[a], size[a], work) for a in range(3))
        tokens = geometry.footprint_tokens(starts, size, source_grid, rows)
        result.append(Footprint(size, tokens, (f, h, w / len(sources))))
    return result


def _gather(sources: Sequence[Tensor], footprints: Sequence[Footprint]) -> Tensor:
    """All footprints of all samples below each other: ``[sum_k B * P_k, D]``."""
    counts = [f.tokens.numel() for f in footprints]
    out = sources[0].new_empty(sum(counts), sources[0].shape[2])
    for source, footprint, rows in zip(sources, footprints, out.split(counts)):
        torch.index_select(source.flatten(0, 1), 0, footprint.tokens.flatten(), out=rows)
    return out


def _scatter(grads: Tensor, source: Tensor, tokens: Tensor, shared_rows: bool) -> Tensor:
    """The transpose of the gather for one source: ``[B * P, D] -> [B_k, N_k, D]``.

    Within a sample tokens are distinct, so a copy does. Samples that share a row are added one after the other: the
    order is fixed, so the sum is too.
    """
    if not shared_rows:
        out = torch.zeros_like(source, memory_format=torch.contiguous_format)
        out.flatten(0, 1).index_copy_(0, tokens.flatten(), grads.to(out.dtype))
        return out
    out = torch.zeros(source.shape, dtype=coordinate_dtype(source.dtype), device=source.device)
    flat = out.flatten(0, 1)
    for of_sample, grad in zip(tokens, grads.to(out.dtype).unflatten(0, tokens.shape)):
        flat.index_copy_(0, of_sample, flat.index_select(0, of_sample) + grad)
    return out.to(source.dtype)


def _pieces(b: int, n_f: int, of_frame: int, scratch: int) -> Iterator[tuple[slice, slice]]:
    """Samples and frames to take at a time, so that frames of ``of_frame`` elements fit ``scratch``; at least one."""
    frames = min(n_f, max(1, scratch // of_frame))
    # The tokens of a piece lie side by side: of several samples only whole ones.
    samples = min(b, max(1, scratch // (of_frame * n_f))) if frames == n_f else 1
    for i in range(0, b, samples):
        for j in range(0, n_f, frames):
            yield slice(i, min(i + samples, b)), slice(j, min(j + frames, n_f))


def _add_context(out: Tensor, values: Tensor, footprints: Sequence[Footprint], beta: int, scratch: int) -> None:
    """``out = beta * out + mean`` over sources of footprints ``[sum_k B * P_k, D]`` spread over the patch, in place.

    ``out`` is ``[B, n_f, n_h, n_w, D]``.
    """
    b, n_f, n_h, _, d = out.shape
    for part, footprint in zip(values.split([f.tokens.numel() for f in footprints]), footprints):
        (pf, ph, pw), (to_f, to_h, to_w) = footprint.size, footprint.matrices
        part = part.view(b, pf, ph * pw * d)
        for some, frames in _pieces(b, n_f, (ph + n_h) * pw * d, scratch):
            place = out[some, frames]
            count = place.shape[1]
            lines = torch.bmm(to_f[some, frames], part[some])
            lines = torch.bmm(to_h[some].repeat_interleave(count, 0), lines.view(-1, ph, pw * d))
            columns = to_w[some].repeat_interleave(count * n_h, 0)
            place.flatten(0, 2).baddbmm_(columns, lines.view(-1, pw, d), beta=beta)
        beta = 1


def _contract(grad: Tensor, footprints: Sequence[Footprint], extra: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """The transpose of :func:`_add_context`, from ``grad [B, n_f, n_h, n_w, D]``.

    ``extra`` are more matrices ``[B, n_w, e_i]`` of the width, which belong to no source: the gradient is read once.

    Returns:
        ``[sum_k B * P_k, D]`` and, of the extra columns, ``[B, n_f, n_h, sum e_i, D]``.
    """
    b, n_f, n_h, _, d = grad.shape
    work = coordinate_dtype(grad.dtype)
    counts, widths = [f.tokens.numel() for f in footprints], [f.size[2] for f in footprints]
    columns = torch.cat([*(f.matrices[2] for f in footprints), *extra], dim=2).transpose(1, 2)
    out = grad.new_empty(sum(counts), d, dtype=work)
    rest = grad.new_empty(b, n_f, n_h, columns.shape[1] - sum(widths), d, dtype=work)
    widths.append(rest.shape[3])
    for some, frames in _pieces(b, n_f, n_h * columns.shape[1] * d, SCRATCH_LARGE):
        piece = grad[some, frames].to(work)
        count = piece.shape[1]
        parts = torch.bmm(columns[some].repeat_interleave(count * n_h, 0), piece.flatten(0, 2))
        *parts_of, own = parts.view(*piece.shape[:3], -1, d).split(widths, dim=3)
        rest[some, frames] = own
        for rows, footprint, part in zip(out.split(counts), footprints, parts_of):
            (pf, ph, pw), (to_f, to_h, _) = footprint.size, footprint.matrices
            lines = torch.bmm(to_h[some].transpose(1, 2).repeat_interleave(count, 0), part.flatten(0, 1).flatten(2))
            rows.view(b, pf, ph * pw * d)[some].baddbmm_(
                to_f[some, frames].transpose(1, 2), lines.view(-1, count, ph * pw * d), beta=int(frames.start > 0)
            )
    return out, rest


def _coordinates(box: Tensor, grid: Triple, work: torch.dtype) -> list[Tensor]:
    box = box.to(work)
    return [axis_positions(box[:, a], box[:, 3 + a], grid[a]) for a in range(3)]


def _extra_columns(box: Tensor, grid: Triple, work: torch.dtype, with_coordinates: bool) -> list[Tensor]:
    """The columns behind those of the sources: the width coordinate, and ones."""
    ones = torch.ones(box.shape[0], grid[2], 1, dtype=work, device=box.device)
    return [_coordinates(box, grid, work)[2][:, :, None], ones] if with_coordinates else [ones]


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
    dtype, d = sources[0].dtype, sources[0].shape[2]
    footprints = _footprints(sources, source_boxes, box, source_index, source_grids, grid, sizes)
    work = coordinate_dtype(dtype)
    out = torch.empty(box.shape[0], *grid, d, dtype=work, device=box.device)
    _add_context(out, _gather(sources, footprints).to(work), footprints, 0, SCRATCH_LARGE)
    return out.view(box.shape[0], -1, d).to(dtype)


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
    """Gradients of the wanted sources. A source that is not wanted still counts in the mean, but costs nothing."""
    footprints = _footprints(sources, source_boxes, box, source_index, source_grids, grid, sizes)
    chosen = [k for k, want in enumerate(wanted) if want]
    of_chosen = [footprints[k] for k in chosen]
    grads, _ = _contract(grad.contiguous().unflatten(1, tuple(grid)), of_chosen)
    return [
        _scatter(g, sources[k], footprints[k].tokens, source_index is not None)
        for k, g in zip(chosen, grads.split([f.tokens.numel() for f in of_chosen]))
    ]


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
    projected: bool = False,
) -> Tensor:
    """``concat[x, context, coordinates] @ weight.T + bias``, ``[B, N, D]``; sources may be projected already."""
    b, _, d = x.shape
    work = coordinate_dtype(x.dtype)
    footprints = _footprints(sources, source_boxes, box, source_index, source_grids, grid, sizes)
    values = _gather(sources, footprints)
    if not projected:
        values = project(values, weight)
    out = torch.mm(x.reshape(-1, d), weight[:, :d].t()).to(work)
    _add_context(out.view(b, *grid, d), values.to(work), footprints, 1, SCRATCH)
    del values  # before the coordinates' rows come
    if weight.shape[1] == 2 * d + 3:
        c_f, c_h, _ = _coordinates(box, grid, work)
        v_f, v_h, v_w = weight[:, 2 * d :].to(work).unbind(1)
        rows = x.new_empty(b, grid[0], grid[1], 2, d, dtype=work)
        rows[:, :, :, 0] = v_w
        torch.add(c_f[:, :, None, None] * v_f, c_h[:, None, :, None] * v_h, out=rows[:, :, :, 1])
        if bias is not None:
            rows[:, :, :, 1] += bias
        columns = torch.cat(_extra_columns(box, grid, work, True), dim=2).repeat_interleave(grid[0] * grid[1], 0)
        out.view(-1, grid[2], d).baddbmm_(columns, rows.flatten(0, 2))
    elif bias is not None:
        out += bias
    return out.view(x.shape).to(x.dtype)


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
    projected: bool = False,
) -> list[Tensor]:
    """Gradients of those of ``x, weight, bias, *sources`` that are wanted, in this order."""
    _, _, d = x.shape
    work = coordinate_dtype(x.dtype)
    want_x, want_weight, want_bias, *want_sources = wanted
    grad = grad.contiguous()
    rows = grad.view(-1, d)
    result = []
    if want_x:
        result.append(torch.mm(rows, weight[:, :d]).view(x.shape))
    if not (want_weight or want_bias or any(want_sources)):
        return result

    footprints = _footprints(sources, source_boxes, box, source_index, source_grids, grid, sizes)
    # The weight needs every source's context gradient, unless they were projected before; the sources their own.
    chosen = [k for k, want in enumerate(want_sources) if want or (want_weight and not projected)]
    of_chosen = [footprints[k] for k in chosen]
    with_coordinates = want_weight and weight.shape[1] == 2 * d + 3
    extra = _extra_columns(box, grid, work, with_coordinates) if want_bias or with_coordinates else []
    context_grad, sums = _contract(grad.unflatten(1, tuple(grid)), of_chosen, extra)
    context_grad = context_grad.to(x.dtype)

    if want_weight:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        # Products straight into columns of the gradient, whose rows of 2D + 3 lie anyhow, take 1.5 times as long.
        grad_weight[:, :d] = torch.mm(rows.t(), x.reshape(-1, d))
        if projected:
            grad_weight[:, d : 2 * d] = 0
        else:
            grad_weight[:, d : 2 * d] = torch.mm(context_grad.t(), _gather(sources, footprints))
        if with_coordinates:
            c_f, c_h, _ = _coordinates(box, grid, work)
            lines = torch.stack(torch.broadcast_tensors(c_f[:, :, None], c_h[:, None, :]), dim=-1)
            of_lines = sums.flatten(0, 2)
            grad_weight[:, 2 * d : 2 * d + 2] = torch.mm(of_lines[:, 1].t(), lines.reshape(-1, 2))
            grad_weight[:, 2 * d + 2] = of_lines[:, 0].sum(0)
        result.append(grad_weight)
    if want_bias:
        result.append(sums[:, :, :, -1].sum((0, 1, 2)).to(x.dtype))
    grads = context_grad.split([f.tokens.numel() for f in of_chosen])
    for k, g in zip(chosen, grads):
        if want_sources[k]:
            source_grad = g if projected else torch.mm(g, weight[:, d : 2 * d])
            result.append(_scatter(source_grad, sources[k], footprints[k].tokens, source_index is not None))
    return result


def project(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows [R, D]`` through the context columns of ``weight``."""
    d = rows.shape[1]
    return torch.mm(rows, weight[:, d : 2 * d].t())


def project_backward(grad: Tensor, rows: Tensor, weight: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    """Gradients of those of ``rows`` and ``weight`` that are wanted."""
    d = rows.shape[1]
    result = []
    if wanted[0]:
        result.append(torch.mm(grad, weight[:, d : 2 * d]))
    if wanted[1]:
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        grad_weight[:, d : 2 * d] = torch.mm(grad.t(), rows)
        result.append(grad_weight)
    return result
