"""Group normalization in PyTorch's own operations, in pieces that fit into the cache.

A unit has statistics of its own: some frames or samples that fit into a piece, or one frame or clip of several pieces.
The pieces of a unit are read once for the statistics, and again for what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.groupnorm.form import Form, interior

PIECE = 1 << 17
"""About how many elements are worked on at once: four tensors of that size in fp32 are 2 MB."""

Piece = tuple[slice, slice, slice]
"""Samples, frames and rows of pixels of ``[B, T, H, W, C]``."""


class _Vectors(NamedTuple):
    """Of each channel: ``out = act((x - mean) * gain + offset)``, each ``[B, T, 1, C]``."""

    mean: Tensor
    gain: Tensor
    offset: Tensor

    def of(self, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Those of the samples and frames of a piece."""
        mean, gain, offset = (t[piece[0], piece[1]] for t in self)
        return mean, gain, offset


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, form: Form, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``out, mean, rstd``; see :func:`hpdm_kernels.groupnorm.ops.group_norm_act_fwd`."""
    work, shape = coordinate_dtype(x.dtype), x.shape
    out = torch.empty(form.padded(shape), dtype=x.dtype, device=x.device)
    inner = interior(out, form, shape)
    mean, rstd = (torch.empty(form.statistics(shape), dtype=work, device=x.device) for _ in range(2))
    for unit, pieces in _units(shape, form.per_clip):
        kept = None
        moments = []
        for piece in pieces:
            kept = _rows(x[piece], work)
            moments.append(_moments(kept))
        which = unit[0], slice(0, 1) if form.per_clip else unit[1]
        mean[which], rstd[which] = _statistics(moments, form, len(pieces) > 1, eps)
        vectors = _vectors(mean, rstd, weight, bias, scale, shift, shape, unit)
        for piece in pieces:
            rows = kept if kept is not None and len(pieces) == 1 else _rows(x[piece], work)
            _, normal = _normalized(rows, vectors, (slice(None), _within(piece[1], unit[1]), piece[2]))
            target = inner[piece]
            if form.silu:
                torch.ops.aten.silu.out(normal.view(target.shape), out=target)
            else:
                target.copy_(normal.view(target.shape))
    _repeat_edges(out, form, shape)
    return out, mean, rstd


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, form: Form,
) -> list[Tensor]:  # fmt: skip
    """Gradients; see :func:`hpdm_kernels.groupnorm.ops.group_norm_act_bwd`."""
    work, shape = mean.dtype, x.shape
    batch, frames, height, width, channels = shape
    dx = torch.empty(shape, dtype=x.dtype, device=x.device)
    # The gradient of z, which the second pass reads; in 16 bits it would be rounded on the way.
    dz = dx if x.dtype is work else torch.empty(shape, dtype=work, device=x.device)
    # Of each frame and channel: the sums of dz, and of dz times the normalized x.
    sums = torch.zeros(2, batch, frames, channels, dtype=work, device=x.device)
    wide = weight.to(work) if scale is None else (1 + scale.to(work)) * weight.to(work)
    wide = wide.expand(batch, frames, channels)
    count = height * width * (channels // form.groups) * (frames if form.per_clip else 1)
    for unit, pieces in _units(shape, form.per_clip):
        vectors = _vectors(mean, rstd, weight, bias, scale, shift, shape, unit)
        inverse = _of_channels(rstd[unit[0], slice(None) if form.per_clip else unit[1]], channels)  # [b, 1 or t, C]
        for piece in pieces:
            local = slice(None), _within(piece[1], unit[1]), piece[2]
            centered, z = _normalized(_rows(x[piece], work), vectors, local)
            above = _folded(grad, form, shape, piece, work)
            if form.silu:
                above = torch.ops.aten.silu_backward(above, z)
            dz[piece].copy_(above.view(dz[piece].shape))
            sums[0, piece[0], piece[1]] += above.sum(2)
            of_rows = inverse[:, slice(None) if form.per_clip else local[1]]
            sums[1, piece[0], piece[1]] += centered.mul_(above).sum(2) * of_rows
        # dx = rstd * (dy - mean(dy) - normal * mean(dy * normal)), with dy = dz * (1 + scale) * weight.
        factor = wide[unit[0], unit[1]]
        axes = (1, 3) if form.per_clip else (3,)
        inner = (sums[:, unit[0], unit[1]] * factor).unflatten(3, (form.groups, -1))  # [2, b, t, G, c]
        means = (inner.sum([axis + 1 for axis in axes], keepdim=True) / count).expand_as(inner).flatten(3)
        gain = (factor * inverse)[:, :, None]
        base, slope = -(means[0] * inverse)[:, :, None], -(means[1] * inverse * inverse)[:, :, None]
        for piece in pieces:
            local = slice(None), _within(piece[1], unit[1])
            rows = _rows(x[piece], work) - vectors.mean[local]
            rows = torch.addcmul(base[local], rows, slope[local], out=rows)
            rows.addcmul_(_rows(dz[piece], work), gain[local])
            dx[piece].copy_(rows.view(dx[piece].shape))
    return [dx, *_gradients_of_vectors(sums, weight, bias, scale, shift)]


def _gradients_of_vectors(
    sums: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> list[Tensor]:
    """Gradients of the vectors, of ``sums [2, B, T, C]`` of dz and of dz times the normalized x."""
    of_shift, of_normal = sums
    work = sums.dtype
    dy = sums if scale is None else sums * (1 + scale.to(work))
    dbias, dweight = dy.sum((1, 2))
    gradients = [dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)]
    if scale is None or shift is None:
        return gradients
    dscale = of_normal * weight.to(work) + of_shift * bias.to(work)
    for of_frames, vector in ((dscale, scale), (of_shift, shift)):
        if vector.shape[1] != of_frames.shape[1]:
            of_frames = of_frames.sum(1, keepdim=True)
        gradients.append(of_frames.to(vector.dtype, copy=True))
    return gradients


# ---- pieces ----


def _units(shape: Sequence[int], per_clip: bool) -> Iterator[tuple[tuple[slice, slice], list[Piece]]]:
    """Samples and frames of each unit, and its pieces: about :data:`PIECE` elements each."""
    batch, frames, height, width, channels = shape
    row, everything = width * channels, slice(None)
    frame = height * row
    if frames * frame <= PIECE:
        samples = max(PIECE // (frames * frame), 1)
        for b in range(0, batch, samples):
            unit = slice(b, b + samples), slice(0, frames)
            yield unit, [(*unit, everything)]
        return
    count = max(PIECE // frame, 1)
    step = height if frame <= PIECE else max(PIECE // row, 1)
    for b in range(batch):
        of_clip: list[Piece] = []
        for t in range(0, frames, count):
            unit = slice(b, b + 1), slice(t, min(t + count, frames))
            of_frame = [(*unit, slice(h, min(h + step, height))) for h in range(0, height, step)]
            of_clip += of_frame
            if not per_clip:
                yield unit, of_frame
        if per_clip:
            yield (slice(b, b + 1), slice(0, frames)), of_clip


def _within(frames: slice, unit: slice) -> slice:
    """Frames of a piece, counted from the first one of its unit."""
    return slice(frames.start - unit.start, frames.stop - unit.start)


def _rows(piece: Tensor, work: torch.dtype) -> Tensor:
    """``[b, t, h, W, C]`` as contiguous rows ``[b, t, h W, C]``: sums have one order, whatever the memory."""
    return piece.to(work).contiguous().flatten(2, 3)


# ---- statistics ----


def _moments(rows: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and sum of squares around it of each channel, ``[b, t, C]`` each, and their number of rows."""
    count = rows.shape[2]
    mean = rows.sum(2) / count
    return mean, (rows - mean[:, :, None]).square_().sum(2), count


def _statistics(
    moments: Sequence[tuple[Tensor, Tensor, int]], form: Form, several: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """``mean`` and ``rstd`` of a unit's groups, ``[b, s, G]``, of the moments of its pieces.

    Moments of parts are merged by the squares of the distances between their means (Chan, Golub and LeVeque 1983).
    """
    # Parts stand where frames do: they are merged for a clip, and for a frame of several pieces.
    means, squares = (torch.cat(parts, dim=1).unflatten(2, (form.groups, -1)) for parts in list(zip(*moments))[:2])
    counts = means.new_tensor([count for part, _, count in moments for _ in range(part.shape[1])])[:, None, None]
    axes = [1, 3] if form.per_clip or several else [3]
    total = (counts.expand(means.shape)).sum(axes, keepdim=True)
    mean = (means * (counts / total)).sum(axes, keepdim=True)
    variance = (squares + (means - mean).square_() * counts).sum(axes, keepdim=True) / total
    return mean.squeeze(3), (variance + eps).rsqrt_().squeeze(3)


def _of_channels(statistics: Tensor, channels: int) -> Tensor:
    """``[b, s, G]`` of groups as ``[b, s, C]`` of channels."""
    return statistics.repeat_interleave(channels // statistics.shape[2], dim=2)


def _vectors(
    mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
    shape: Sequence[int], unit: tuple[slice, slice],
) -> _Vectors:  # fmt: skip
    """The vectors of a unit's frames."""
    samples, frames = unit
    work, count = mean.dtype, frames.stop - frames.start
    of_mean, gain = (
        _of_channels(t[samples, frames if t.shape[1] == shape[1] else slice(None)], shape[4]) for t in (mean, rstd)
    )
    gain, offset = gain * weight.to(work), bias.to(work)
    if scale is not None and shift is not None:
        factor, added = (
            t[samples, frames if t.shape[1] == shape[1] else slice(None)].to(work) for t in (1 + scale, shift)
        )
        gain, offset = gain * factor, torch.addcmul(added, offset, factor)
    size = len(of_mean), count, shape[4]
    mean, gain, offset = (t.expand(size)[:, :, None] for t in (of_mean, gain, offset))
    return _Vectors(mean, gain, offset)


def _normalized(rows: Tensor, vectors: _Vectors, piece: Piece) -> tuple[Tensor, Tensor]:
    """Rows minus their mean, and normalized and modulated, ``[b, t, h W, C]`` each."""
    mean, gain, offset = vectors.of(piece)
    centered = rows - mean
    return centered, torch.addcmul(offset, centered, gain)


# ---- edges ----


def _repeat_edges(out: Tensor, form: Form, shape: Sequence[int]) -> None:
    """Fills what is around the interior: first along W, last along T, so that corners are repeated, too."""
    edges = list(form.edges(shape))
    for i, (axis, front, size, back) in reversed(list(enumerate(edges))):
        known = out
        for other, start, n, _ in edges[:i]:
            known = known.narrow(other, start, n)
        known.narrow(axis, 0, front).copy_(known.narrow(axis, front, 1).expand_as(known.narrow(axis, 0, front)))
        behind = known.narrow(axis, front + size, back)
        behind.copy_(known.narrow(axis, front + size - 1, 1).expand_as(behind))


def _folded(grad: Tensor, form: Form, shape: Sequence[int], piece: Piece, work: torch.dtype) -> Tensor:
    """The gradient of a piece's rows: that of the interior, and of what repeats its edges; ``[b, t, h W, C]``."""
    if not form.is_padded:
        return _rows(grad[piece], work)
    part, sides = grad[piece[0]], []
    for axis, front, back, places in zip((1, 2, 3), form.pad[::2], form.pad[1::2], (piece[1], piece[2], slice(None))):
        start, stop, _ = places.indices(shape[axis])
        before, behind = (front if start == 0 else 0), (back if stop == shape[axis] else 0)
        part = part.narrow(axis, front + start - before, stop - start + before + behind)
        sides.append((axis, before, stop - start, behind))
    part = part.to(work, copy=True, memory_format=torch.contiguous_format)
    for axis, before, size, behind in sides:
        if before:
            part.select(axis, before).add_(part.narrow(axis, 0, before).sum(axis))
        if behind:
            part.select(axis, before + size - 1).add_(part.narrow(axis, before + size, behind).sum(axis))
        part = part.narrow(axis, before, size)
    return _rows(part, work)
