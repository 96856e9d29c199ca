"""Group normalization in PyTorch's own operations, in pieces that fit into the cache.

A unit has statistics of its own: some frames or samples that fit into a piece, or one frame or clip of several pieces.
The pieces of a unit are read once for the statistics, and again for what is made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.groupnorm.edges import folded, interior, repeat_edges, rows_of
from hpdm_kernels.groupnorm.form import Form
from hpdm_kernels.groupnorm.pieces import Piece, Unit, of_unit, units

PIECE = 1 << 18
"""About how many elements are worked on at once: three tensors of that size in fp32 are 3 MB."""


class _Moments(NamedTuple):
    """Of each channel in a piece."""

    mean: Tensor
    """``[b, t, C]``."""
    squares: Tensor
    """Sum of squares around the mean, ``[b, t, C]``."""
    number: int
    """Number of rows."""


class _Scratch:
    """Memory for two tensors of a piece, allocated once: new memory is slow on its first use."""

    def __init__(self, like: Tensor, work: torch.dtype) -> None:
        self.memory: list[Tensor] = []
        self.like, self.work = like, work

    def __call__(self, which: int, rows: Tensor) -> Tensor:
        """The ``which``-th tensor, of the shape of ``rows``; the first piece is the largest."""
        if not self.memory:
            self.memory = [torch.empty(rows.numel(), dtype=self.work, device=self.like.device) for _ in range(2)]
        return self.memory[which][: rows.numel()].view(rows.shape)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, form: Form, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``out, mean, rstd``; see :func:`hpdm_kernels.groupnorm.ops.group_norm_act_fwd`."""
    work, shape = coordinate_dtype(x.dtype), x.shape
    out = torch.empty(form.padded(shape), dtype=x.dtype, device=x.device)
    inner = interior(out, form, shape)
    mean, rstd = (torch.empty(form.statistics(shape), dtype=work, device=x.device) for _ in range(2))
    gain, offset = _affine(weight, bias, scale, shift, work)
    scratch = _Scratch(x, work)
    for unit, pieces in units(shape, form.per_clip, PIECE):
        moments = [_moments(rows_of(x[piece], work), scratch) for piece in pieces]
        which = of_unit(mean, unit, shape)
        mean[which], rstd[which] = _statistics(moments, form, len(pieces) > 1, eps)
        center, inverse = (_of_channels(t[which], shape[4]) for t in (mean, rstd))
        slope = of_unit(gain, unit, shape)
        factor, added = inverse * gain[slope], offset[slope]
        if len(pieces) == 1:
            # What is in the first scratch tensor has the mean of its channel subtracted, not that of its group.
            added = torch.addcmul(added, moments[0].mean - center, factor)
        for piece in pieces:
            rows = scratch(0, rows_of(x[piece], work)) if len(pieces) == 1 else rows_of(x[piece], work)
            center_of, factor_of, added_of = (_of_piece(t, piece, unit) for t in (center, factor, added))
            if len(pieces) > 1:
                rows = torch.sub(rows, center_of, out=scratch(0, rows))
            _write(torch.addcmul(added_of, rows, factor_of, out=rows), form.silu, inner[piece])
    repeat_edges(out, form, shape)
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
    gain, offset = _affine(weight, bias, scale, shift, work)
    count = height * width * (channels // form.groups) * (frames if form.per_clip else 1)
    scratch = _Scratch(x, work)
    for unit, pieces in units(shape, form.per_clip, PIECE):
        which, slope = of_unit(mean, unit, shape), of_unit(gain, unit, shape)
        center, inverse = (_of_channels(t[which], channels) for t in (mean, rstd))
        factor, added = inverse * gain[slope], offset[slope]
        for piece in pieces:
            center_of, factor_of, added_of = (_of_piece(t, piece, unit) for t in (center, factor, added))
            rows = rows_of(x[piece], work)
            centered = torch.sub(rows, center_of, out=scratch(0, rows))
            above = folded(grad, form, shape, piece, work)
            if form.silu:
                z = torch.addcmul(added_of, centered, factor_of, out=scratch(1, rows))
                above = torch.ops.aten.silu_backward.grad_input(above, z, grad_input=z)
            dz[piece].copy_(above.view(dz[piece].shape))
            sums[0, piece[0], piece[1]] += above.sum(2)
            sums[1, piece[0], piece[1]] += torch.mul(centered, above, out=scratch(1, rows)).sum(2)
        sums[1, unit[0], unit[1]] *= inverse
        # dx = rstd * (dy - mean(dy) - normal * mean(dy * normal)), with dy = dz * (1 + scale) * weight.
        inner = (sums[:, unit[0], unit[1]] * gain[slope]).unflatten(3, (form.groups, -1))  # [2, b, t, G, c]
        means = inner.sum([2, 4] if form.per_clip else [4], keepdim=True).expand(*([-1] * 4), channels // form.groups)
        means = means.flatten(3) * (inverse / -count)
        base, change = means[0], means[1] * inverse
        for piece in pieces:
            center_of, factor_of, base_of, change_of = (
                _of_piece(t, piece, unit) for t in (center, factor, base, change)
            )
            rows = rows_of(x[piece], work)
            centered = scratch(0, rows) if len(pieces) == 1 else torch.sub(rows, center_of, out=scratch(0, rows))
            result = torch.addcmul(base_of, centered, change_of, out=centered)
            target = dx[piece]
            target.copy_(result.addcmul_(rows_of(dz[piece], work), factor_of).view(target.shape))
    return [dx, *_gradients_of_vectors(sums, weight, bias, scale, shift)]


def _gradients_of_vectors(
    sums: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None
) -> list[Tensor]:
    """Gradients of the vectors, of ``sums [2, B, T, C]`` of dz and of dz times the normalized x."""
    of_shift, of_normal = sums
    work = sums.dtype
    dbias, dweight = (sums if scale is None else sums * (1 + scale.to(work))).sum((1, 2))
    gradients = [dweight.to(weight.dtype, copy=True), dbias.to(bias.dtype, copy=True)]
    if scale is None or shift is None:
        return gradients
    dscale = of_normal * weight.to(work) + of_shift * bias.to(work)
    for of_frames, vector in ((dscale, scale), (of_shift, shift)):
        summed = of_frames if vector.shape[1] == of_frames.shape[1] else of_frames.sum(1, keepdim=True)
        gradients.append(summed.to(vector.dtype, copy=True))
    return gradients


def _affine(
    weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, work: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What normalized rows are multiplied with, and what is added: ``[B or 1, T or 1, C]`` each."""
    gain, offset = weight.to(work)[None, None], bias.to(work)[None, None]
    if scale is None or shift is None:
        return gain, offset
    factor = 1 + scale.to(work)
    return gain * factor, torch.addcmul(shift.to(work), offset, factor)


def _of_piece(vectors: Tensor, piece: Piece, unit: Unit) -> Tensor:
    """Vectors of a unit ``[1 or b, 1 or t, C]`` for the rows of one of its pieces, ``[.., .., 1, C]``."""
    if vectors.shape[1] > 1:
        start = unit[1].start
        vectors = vectors[:, piece[1].start - start : piece[1].stop - start]
    return vectors[:, :, None]


def _of_channels(statistics: Tensor, channels: int) -> Tensor:
    """``[b, s, G]`` of groups as ``[b, s, C]`` of channels."""
    b, s, groups = statistics.shape
    return statistics[..., None].expand(b, s, groups, channels // groups).reshape(b, s, channels)


def _write(z: Tensor, silu: bool, target: Tensor) -> None:
    """Writes activated rows ``[b, t, h W, C]`` into their place in the result, ``[b, t, h, W, C]``."""
    z = z.view(target.shape)
    if silu and z.dtype is target.dtype:
        torch.ops.aten.silu.out(z, out=target)
    else:
        target.copy_(torch.ops.aten.silu_(z) if silu else z)


def _moments(rows: Tensor, scratch: _Scratch) -> _Moments:
    """The moments of ``rows [b, t, n, C]``, which leave the rows minus their means in the first scratch tensor."""
    mean = rows.sum(2) / rows.shape[2]
    centered = torch.sub(rows, mean[:, :, None], out=scratch(0, rows))
    return _Moments(mean, torch.mul(centered, centered, out=scratch(1, rows)).sum(2), rows.shape[2])


def _statistics(moments: Sequence[_Moments], form: Form, several: bool, eps: float) -> tuple[Tensor, Tensor]:
    """``mean`` and ``rstd`` of a unit's groups, ``[b, s, G]``, of the moments of its pieces.

    Moments of parts are merged by the squares of the distances between their means (Chan, Golub and LeVeque 1983).
    """
    # Parts stand where frames do: they are merged for a clip, and for a frame of several pieces.
    axes = [1, 3] if form.per_clip or several else [3]
    counts = [m.number for m in moments for _ in range(m.mean.shape[1])]
    means, squares, *_ = moments[0]
    if several:
        means, squares = torch.cat([m.mean for m in moments], dim=1), torch.cat([m.squares for m in moments], dim=1)
    means, squares = (t.unflatten(2, (form.groups, -1)) for t in (means, squares))  # [b, parts, G, c]
    weights: Tensor | int = means.new_tensor(counts)[:, None, None] if several else counts[0]
    total = means.shape[3] * (sum(counts) if len(axes) == 2 else counts[0])
    mean = (means * weights).sum(axes, keepdim=True) / total
    variance = (means - mean).square_().mul_(weights).add_(squares).sum(axes, keepdim=True).div_(total)
    return mean.squeeze(3), variance.add_(eps).rsqrt_().squeeze(3)
