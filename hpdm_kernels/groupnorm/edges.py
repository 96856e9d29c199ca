"""Repeated edges of clips ``[B, T, H, W, C]``, forward and backward, in PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels.groupnorm.form import Form
from hpdm_kernels.groupnorm.pieces import Piece


def rows_of(piece: Tensor, work: torch.dtype) -> Tensor:
    """``[b, t, h, W, C]`` as contiguous rows ``[b, t, h W, C]``: sums have one order, whatever the memory."""
    return piece.to(work).contiguous().flatten(2, 3)


def interior(out: Tensor, form: Form, shape: Sequence[int]) -> Tensor:
    """The part of a padded tensor that is not repeated, a view of ``shape``."""
    for axis, front, size, _ in form.edges(shape):
        out = out.narrow(axis, front, size)
    return out


def repeat_edges(out: Tensor, form: Form, shape: Sequence[int]) -> None:
    """Fills what is around the interior: first along W, last along T, so that corners are repeated, too."""
    edges = list(form.edges(shape))
    for i, (axis, front, size, back) in reversed(list(enumerate(edges))):
        known = out
        for other, start, n, _ in edges[:i]:
            known = known.narrow(other, start, n)
        for edge, start, count in ((front, 0, front), (front + size - 1, front + size, back)):
            places = known.narrow(axis, start, count)
            places.copy_(known.narrow(axis, edge, 1).expand_as(places))


def folded(grad: Tensor, form: Form, shape: Sequence[int], piece: Piece, work: torch.dtype) -> Tensor:
    """The gradient of a piece's rows: that of the interior, and of what repeats its edges; ``[b, t, h W, C]``."""
    if not form.is_padded:
        return rows_of(grad[piece], work)
    part, sides = grad[piece[0]], []
    for axis, places in zip((1, 2, 3), (piece[1], piece[2], slice(0, shape[3]))):
        front, back = form.pad[2 * axis - 2 : 2 * axis]
        before, behind = (front if places.start == 0 else 0), (back if places.stop == shape[axis] else 0)
        size = places.stop - places.start
        part = part.narrow(axis, front + places.start - before, before + size + behind)
        sides.append((axis, before, size, behind))
    part = part.to(work, copy=True, memory_format=torch.contiguous_format)
    for axis, before, size, behind in sides:
        if before:
            part.select(axis, before).add_(part.narrow(axis, 0, before).sum(axis))
        if behind:
            part.select(axis, before + size - 1).add_(part.narrow(axis, before + size, behind).sum(axis))
        part = part.narrow(axis, before, size)
    return rows_of(part, work)
