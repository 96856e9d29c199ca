"""Multi-level context in portable PyTorch: three small matrix products per source instead of 8-corner gathers.

Hat matrices (``geometry``) expand a source's footprint ``[pf, ph, pw, D]`` one axis at a time: frames, height, and last
width, whose product adds to the output in place. In the backward the width comes first, for all sources in one product
that reads the gradient once. The width's matrix includes the mean over sources. ``fuse_context`` adds two more columns
for the coordinates and the bias, which are separable, too:

    out[f, h] = x[f, h] @ Wx.T + sum_k W_k @ T_k[f, h] + [c_w, 1] @ [v_w, b + c_f v_f + c_h v_h]

with ``W_k`` the ``[n_w, pw_k]`` hat matrices, ``T_k`` the footprints expanded along frames and height, and ``v`` the
coordinate columns of the weight. Besides the product ``x @ Wx.T``, this reads and writes the output once per source,
writes and reads ``T_k`` (``pw_k / n_w`` of the output, a few frames at a time), and reads the footprints. Memory beyond
the inputs is at most the output, the projections of the footprints, and ``SCRATCH``. Writing all ``T_k`` into one
buffer would save passes over the output, but its strided products cost a thread barrier per line.

16-bit data is interpolated in fp32. Products follow PyTorch's own setting; the argument ``precision`` is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels._checks import Triple
from hpdm_kernels.boxes import coordinate_dtype, token_positions
from hpdm_kernels.context.geometry import Geometry, footprint_index, hat_matrix, source_positions
from hpdm_kernels.context.weight import FusionWeight

FORWARD_SCRATCH = 1 << 18
"""Size limit (elements) of the temporary between footprints and output in the fusion's forward: 1 MB in fp32, small
beside any output, and hardly slower than no limit."""
SCRATCH = 1 << 22
"""The limit elsewhere: 16 MB in fp32, below the size from which malloc maps, and returns, memory at every call."""


class Interpolation(NamedTuple):
    """How the patches' tokens are interpolated from one source: the tokens to read, and the interpolation matrices."""

    footprint: Triple
    """(pf, ph, pw), with product ``P``."""
    token_index: Tensor
    """``[B, P]``, the footprints' tokens in the source flattened to ``[B_k * N_k, D]``."""
    matrices: tuple[Tensor, Tensor, Tensor]
    """Hat matrices ``[B, n, p]`` of frames, height and width; the last one includes the mean's factor ``1 / K``."""


def _interpolations(geometry: Geometry, dtype: torch.dtype) -> list[Interpolation]:
    """One interpolation per source, for data of ``dtype``."""
    result = []
    for k, (footprint, source_grid) in enumerate(zip(geometry.footprints, geometry.source_grids)):
        positions = source_positions(geometry, k)
        f, h, w = (hat_matrix(positions, a, geometry.grid[a], footprint[a], coordinate_dtype(dtype)) for a in range(3))
        index = footprint_index(positions, footprint, source_grid, geometry.rows_of_source(k))
        result.append(Interpolation(footprint, index, (f, h, w / len(geometry.footprints))))
    return result


def _gather(sources: Sequence[Tensor], interpolations: Sequence[Interpolation]) -> Tensor:
    """The tokens of all footprints, concatenated source by source: ``[sum_k B * P_k, D]``."""
    counts = [i.token_index.numel() for i in interpolations]
    out = sources[0].new_empty(sum(counts), sources[0].shape[2])
    for source, interpolation, rows in zip(sources, interpolations, out.split(counts)):
        torch.index_select(source.flatten(0, 1), 0, interpolation.token_index.flatten(), out=rows)
    return out


def _scatter(grad: Tensor, source: Tensor, index: Tensor, shared_rows: bool) -> Tensor:
    """The transpose of the gather for one source: ``[B * P, D] -> [B_k, N_k, D]``.

    Tokens within a sample are distinct, so they are copied. If samples may share a row of the source (``shared_rows``),
    they are added one after another, in a fixed order, so that every run gives the same bits.
    """
    if not shared_rows:
        out = torch.zeros_like(source, memory_format=torch.contiguous_format)
        out.flatten(0, 1).index_copy_(0, index.flatten(), grad.to(out.dtype))
        return out
    out = torch.zeros(source.shape, dtype=coordinate_dtype(source.dtype), device=source.device)
    flat = out.flatten(0, 1)
    for tokens, sample_grad in zip(index, grad.to(out.dtype).unflatten(0, index.shape)):
        flat.index_copy_(0, tokens, flat.index_select(0, tokens) + sample_grad)
    return out.to(source.dtype)


def _chunks(b: int, n_f: int, frame_elements: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Chunks of samples and frames: at most ``limit`` elements, ``frame_elements`` per frame, but at least a frame."""
    frames = min(n_f, max(1, limit // frame_elements))
    # The tokens of a chunk must be contiguous, so a chunk has several samples only if it has all their frames.
    samples = min(b, max(1, limit // (frame_elements * n_f))) if frames == n_f else 1
    for i in range(0, b, samples):
        for j in range(0, n_f, frames):
            yield slice(i, min(i + samples, b)), slice(j, min(j + frames, n_f))


def _add_context(out: Tensor, tokens: Tensor, interpolations: Sequence[Interpolation], beta: int, scratch: int) -> None:
    """``out = beta * out + mean``, the mean over sources of the interpolated footprints, in place.

    Args:
        out: ``[B, n_f, n_h, n_w, D]``.
        tokens: ``[sum_k B * P_k, D]``, as :func:`_gather` orders them.
        interpolations: one per source.
        beta: 0 or 1.
        scratch: size limit of the temporary, in elements.
    """
    b, n_f, n_h, _, d = out.shape
    for part, interpolation in zip(tokens.split([i.token_index.numel() for i in interpolations]), interpolations):
        (pf, ph, pw), (to_f, to_h, to_w) = interpolation.footprint, interpolation.matrices
        part = part.view(b, pf, ph * pw * d)
        for samples, frames in _chunks(b, n_f, (ph + n_h) * pw * d, scratch):
            chunk = out[samples, frames]  # [b, f, n_h, n_w, D]
            f = chunk.shape[1]
            lines = torch.bmm(to_f[samples, frames], part[samples])  # [b, f, ph * pw * D]
            lines = torch.bmm(to_h[samples].repeat_interleave(f, 0), lines.view(-1, ph, pw * d))  # [b * f, n_h, pw * D]
            columns = to_w[samples].repeat_interleave(f * n_h, 0)  # [b * f * n_h, n_w, pw]
            chunk.flatten(0, 2).baddbmm_(columns, lines.view(-1, pw, d), beta=beta)
        beta = 1


def _contract(
    grad: Tensor, interpolations: Sequence[Interpolation], extra: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """The transpose of :func:`_add_context`.

    Args:
        grad: ``[B, n_f, n_h, n_w, D]``.
        interpolations: those of the sources whose footprints get a gradient.
        extra: further width matrices ``[B, n_w, e_i]``, which belong to no source. The gradient is read once for all.

    Returns:
        Gradients of the footprints ``[sum_k B * P_k, D]`` and of the extra columns ``[B, n_f, n_h, sum e_i, D]``.
    """
    b, n_f, n_h, _, d = grad.shape
    work = coordinate_dtype(grad.dtype)
    matrices = [*(i.matrices[2] for i in interpolations), *extra]
    if not matrices:
        return grad.new_empty(0, d, dtype=work), grad.new_empty(b, n_f, n_h, 0, d, dtype=work)
    columns = torch.cat(matrices, dim=2).transpose(1, 2)  # [B, sum_k pw_k + sum e_i, n_w]
    counts, widths = [i.token_index.numel() for i in interpolations], [i.footprint[2] for i in interpolations]
    out = grad.new_empty(sum(counts), d, dtype=work)
    extra_out = grad.new_empty(b, n_f, n_h, columns.shape[1] - sum(widths), d, dtype=work)
    widths.append(extra_out.shape[3])
    for samples, frames in _chunks(b, n_f, n_h * columns.shape[1] * d, SCRATCH):
        chunk = grad[samples, frames].to(work)  # [b, f, n_h, n_w, D]
        f = chunk.shape[1]
        lines = torch.bmm(columns[samples].repeat_interleave(f * n_h, 0), chunk.flatten(0, 2))
        *source_lines, extra_lines = lines.view(*chunk.shape[:3], -1, d).split(widths, dim=3)  # [b, f, n_h, pw, D]
        extra_out[samples, frames] = extra_lines
        for rows, interpolation, part in zip(out.split(counts), interpolations, source_lines):
            (pf, ph, pw), (to_f, to_h, _) = interpolation.footprint, interpolation.matrices
            part = part.flatten(0, 1).flatten(2)  # [b * f, n_h, pw * D]
            part = torch.bmm(to_h[samples].transpose(1, 2).repeat_interleave(f, 0), part)  # [b * f, ph, pw * D]
            rows.view(b, pf, ph * pw * d)[samples].baddbmm_(
                to_f[samples, frames].transpose(1, 2), part.view(-1, f, ph * pw * d), beta=int(frames.start > 0)
            )
    return out, extra_out


def _axis_coordinates(geometry: Geometry, work: torch.dtype) -> list[Tensor]:
    """Absolute coordinates of the tokens on each axis, ``[B, n_f]``, ``[B, n_h]`` and ``[B, n_w]``."""
    box = geometry.box.to(work)
    return [token_positions(box[:, a], box[:, 3 + a], geometry.grid[a]) for a in range(3)]


def _extra_columns(geometry: Geometry, work: torch.dtype, with_coordinates: bool) -> list[Tensor]:
    """The columns after those of the sources, ``[B, n_w, 1]`` each: the width's coordinate (if needed), and ones."""
    ones = torch.ones(geometry.box.shape[0], geometry.grid[2], 1, dtype=work, device=geometry.box.device)
    return [_axis_coordinates(geometry, work)[2][:, :, None], ones] if with_coordinates else [ones]


def _no_plan(like: Tensor) -> Tensor:
    """Stands for the plan that the kernels keep for the backward; here positions are cheap, and computed again."""
    return like.new_empty(0, dtype=torch.int32)


def sample_forward(sources: Sequence[Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Mean over the sources of trilinear samples, ``[B, N, D]`` (eq. 7), and no plan."""
    dtype, (b, d) = sources[0].dtype, (geometry.box.shape[0], sources[0].shape[2])
    interpolations = _interpolations(geometry, dtype)
    work = coordinate_dtype(dtype)
    out = torch.empty(b, *geometry.grid, d, dtype=work, device=geometry.box.device)
    _add_context(out, _gather(sources, interpolations).to(work), interpolations, 0, SCRATCH)
    return out.view(b, -1, d).to(dtype), _no_plan(out)


def sample_backward(
    grad: Tensor, sources: Sequence[Tensor], geometry: Geometry, plan: Tensor, needs_grad: Sequence[bool]
) -> list[Tensor]:
    """Gradients ``[B_k, N_k, D]`` of the sources that need one, from ``grad [B, N, D]``."""
    interpolations = _interpolations(geometry, sources[0].dtype)
    chosen = [k for k, needed in enumerate(needs_grad) if needed]
    grads, _ = _contract(grad.contiguous().unflatten(1, geometry.grid), [interpolations[k] for k in chosen])
    return [
        _scatter(g, sources[k], interpolations[k].token_index, geometry.source_index is not None)
        for k, g in zip(chosen, grads.split([interpolations[k].token_index.numel() for k in chosen]))
    ]


def fuse_forward(
    x: Tensor,
    sources: Sequence[Tensor],
    geometry: Geometry,
    weight: FusionWeight,
    bias: Tensor | None,
    projected: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """``concat[x, context, coordinates] @ weight.T + bias``, ``[B, N, D]`` (eq. 9), and no plan.

    ``projected``: the sources are.
    """
    b, _, d = x.shape
    work = coordinate_dtype(x.dtype)
    interpolations = _interpolations(geometry, x.dtype)
    tokens = _gather(sources, interpolations)  # [sum_k B * P_k, D]
    if not projected:
        tokens = project(tokens, weight, precision)
    out = torch.mm(x.reshape(-1, d), weight.of_x.t()).to(work)  # [B * N, D]
    _add_context(out.view(b, *geometry.grid, d), tokens.to(work), interpolations, 1, FORWARD_SCRATCH)
    del tokens  # before the coordinates' rows are allocated
    if weight.of_coordinates is not None:
        _add_coordinates(out, geometry, weight.of_coordinates.to(work), bias)
    elif bias is not None:
        out += bias
    return out.view(x.shape).to(x.dtype), _no_plan(x)


def _add_coordinates(out: Tensor, geometry: Geometry, weight: Tensor, bias: Tensor | None) -> None:
    """Adds ``coordinates @ weight.T + bias`` to ``out [B * N, D]``; ``weight [D, 3]`` has the dtype of ``out``."""
    (n_f, n_h, n_w), (b, d) = geometry.grid, (geometry.box.shape[0], out.shape[1])
    c_f, c_h, _ = _axis_coordinates(geometry, out.dtype)
    v_f, v_h, v_w = weight.unbind(1)
    rows = out.new_empty(b, n_f, n_h, 2, d)
    rows[:, :, :, 0] = v_w
    torch.add(c_f[:, :, None, None] * v_f, c_h[:, None, :, None] * v_h, out=rows[:, :, :, 1])
    if bias is not None:
        rows[:, :, :, 1] += bias
    columns = torch.cat(_extra_columns(geometry, out.dtype, True), dim=2).repeat_interleave(n_f * n_h, 0)
    out.view(-1, n_w, d).baddbmm_(columns, rows.flatten(0, 2))


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
    grad = grad.contiguous()
    rows = grad.view(-1, x.shape[2])  # [B * N, D]
    result = []
    if need_x:
        result.append(torch.mm(rows, weight.of_x).view(x.shape))
    if not any(needs_grad[1:]):
        return result
    interpolations = _interpolations(geometry, x.dtype)
    # Sources whose footprints need a gradient: those that need one themselves, and all if the weight needs one, unless
    # the sources are projected already.
    chosen = [k for k, needed in enumerate(need_sources) if needed or (need_weight and not projected)]
    need_coordinates = need_weight and weight.of_coordinates is not None
    extra = []
    if need_bias or need_coordinates:
        extra = _extra_columns(geometry, coordinate_dtype(x.dtype), need_coordinates)
    context_grad, line_sums = _contract(grad.unflatten(1, geometry.grid), [interpolations[k] for k in chosen], extra)
    context_grad = context_grad.to(x.dtype)  # [sum_k B * P_k, D]
    if need_weight:
        whole, part = weight.new_empty()
        # Products straight into columns of the gradient would be slower: its rows lie 2D + 3 elements apart.
        part.of_x.copy_(torch.mm(rows.t(), x.reshape(-1, x.shape[2])))
        if projected:
            part.of_context.zero_()
        else:
            part.of_context.copy_(torch.mm(context_grad.t(), _gather(sources, interpolations)))
        if part.of_coordinates is not None:
            _write_coordinates_gradient(part.of_coordinates, line_sums, geometry)
        result.append(whole)
    if need_bias:
        result.append(line_sums[:, :, :, -1].sum((0, 1, 2)).to(x.dtype))
    for k, g in zip(chosen, context_grad.split([interpolations[k].token_index.numel() for k in chosen])):
        if need_sources[k]:
            source_grad = g if projected else torch.mm(g, weight.of_context)  # [B * P_k, D]
            result.append(
                _scatter(source_grad, sources[k], interpolations[k].token_index, geometry.source_index is not None)
            )
    return result


def _write_coordinates_gradient(out: Tensor, line_sums: Tensor, geometry: Geometry) -> None:
    """Gradient of the coordinates' weight, ``out [D, 3]``.

    ``line_sums [B, n_f, n_h, 2, D]`` has two sums of the output's gradient over each line of tokens: weighted by the
    width's coordinate, and unweighted.
    """
    c_f, c_h, _ = _axis_coordinates(geometry, line_sums.dtype)
    coordinates = torch.stack(torch.broadcast_tensors(c_f[:, :, None], c_h[:, None, :]), dim=-1)  # [B, n_f, n_h, 2]
    lines = line_sums.flatten(0, 2)  # [B * n_f * n_h, 2, D]
    out[:, :2] = torch.mm(lines[:, 1].t(), coordinates.reshape(-1, 2))
    out[:, 2] = lines[:, 0].sum(0)


def project(rows: Tensor, weight: FusionWeight, precision: str) -> Tensor:
    """``rows @ Wc.T``, the product with the weight's context columns: ``[R, D] -> [R, D]``."""
    return torch.mm(rows, weight.of_context.t())


def project_backward(
    grad: Tensor, rows: Tensor, weight: FusionWeight, needs_grad: Sequence[bool], precision: str
) -> list[Tensor]:
    """Gradients of those of ``rows`` and the weight that need one; ``grad`` and ``rows`` are ``[R, D]``."""
    result = []
    if needs_grad[0]:
        result.append(torch.mm(grad, weight.of_context))
    if needs_grad[1]:
        whole, part = weight.new_empty()
        whole.zero_()
        part.of_context.copy_(torch.mm(grad.t(), rows))
        result.append(whole)
    return result
