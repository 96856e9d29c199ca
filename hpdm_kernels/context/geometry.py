"""Where a patch's tokens fall in the tokens of another patch: per axis, per sample, in closed form.

Boxes are axis-aligned, so everything about trilinear sampling factors over the three axes. Token ``i`` of ``n`` sits at

    u_i = first + i * step,    step = s * m / n,    first = (o + s * 0.5 / n) * m - 0.5

in units of the ``m`` tokens of the source, where ``(o, s)`` is the box relative to the source's box (paper eq. 8). What
a patch touches of its source is a contiguous *footprint* of ``p <= m`` tokens from ``start`` on. In local coordinates
``u_i - start``, clamping to ``[0, p - 1]`` is the border padding, and the weight of footprint token ``j`` is the hat
``max(0, 1 - |u_i - j|)``. ``start`` differs from sample to sample, ``p`` must not, because it is a shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.floating]

# Boxes are fp32: a position in units of the whole source is not known better than this.
POSITION_SLACK = 4 * torch.finfo(torch.float32).eps


def footprint_size(relative_scale: float, n: int, n_source: int) -> int:
    """Upper bound of the number of source tokens that ``n`` tokens of a patch touch along one axis.

    The first and the last token are ``d = relative_scale * n_source * (n - 1) / n`` source tokens apart. Their lower
    neighbours are at most ``ceil(d)`` apart, whatever the offset, and both these and one upper neighbour are read:
    ``ceil(d) + 2`` tokens, never more than there are.

    Args:
        relative_scale: the scale of the patch's box divided by that of the source's box, in ``(0, 1]``.
        n: tokens of the patch along the axis.
        n_source: tokens of the source along the axis.

    Raises:
        ValueError: a scale outside ``(0, 1]`` (beyond fp32 rounding) or a size below 1.
    """
    if not 0 < relative_scale <= 1 + 1e-4:
        raise ValueError(f"relative_scale: got {relative_scale}, expected a number in (0, 1]")
    if n < 1 or n_source < 1:
        raise ValueError(f"n, n_source: got {n}, {n_source}, expected both >= 1")
    distance = relative_scale * n_source * (n - 1) / n
    return min(n_source, max(0, math.ceil(distance - POSITION_SLACK * n_source)) + 2)


class AxisPositions(NamedTuple):
    """Positions of a patch's tokens in one source, for the three axes of every sample; all are ``[B, 3]`` float64."""

    first: Tensor
    """Position of token 0, in source tokens; below 0 or above ``m - 1`` it lies on the border."""
    step: Tensor
    """Distance of neighbouring tokens, in source tokens."""


def axis_positions(box: Tensor, source_box: Tensor, grid: Sequence[int], source_grid: Sequence[int]) -> AxisPositions:
    """Positions from boxes ``[B, 6]``. Computed in fp64: it costs nothing here and leaves one rounding to fp32."""
    box, source_box = box.double(), source_box.double()
    offset = (box[:, :3] - source_box[:, :3]) / source_box[:, 3:]
    scale = box[:, 3:] / source_box[:, 3:]
    first, step = [], []
    for a in range(3):
        n, m = grid[a], source_grid[a]
        first.append((offset[:, a] + scale[:, a] * (0.5 / n)) * m - 0.5)
        step.append(scale[:, a] * (m / n))
    return AxisPositions(torch.stack(first, 1), torch.stack(step, 1))


def footprint_start(positions: AxisPositions, axis: int, footprint: int, n_source: int) -> Tensor:
    """First footprint token along ``axis``, ``[B]`` float64 (whole numbers), such that the footprint is in the grid."""
    return positions.first[:, axis].floor().clamp(0, n_source - footprint)


def needed_footprint(
    box: FloatArray, source_box: FloatArray, grid: Sequence[int], source_grid: Sequence[int], slack: float = 0.0
) -> tuple[int, int, int]:
    """Tokens that boxes ``[B, 6]`` touch, per axis the most over the samples; :func:`axis_positions` in numpy.

    With ``slack`` (in units of the whole source) an upper neighbour that is touched by rounding alone does not count.
    """
    box, source_box = box.astype(np.float64), source_box.astype(np.float64)
    n, m = np.array(grid), np.array(source_grid)
    offset, scale = (box[:, :3] - source_box[:, :3]) / source_box[:, 3:], box[:, 3:] / source_box[:, 3:]
    first = (offset + scale * (0.5 / n)) * m - 0.5
    last = first + (n - 1) * (scale * (m / n)) - slack * m
    # The upper neighbour of a position is the lowest token that is not below it.
    count = np.ceil(last.clip(0, m - 1)) - np.floor(first.clip(0, m - 1))
    f, h, w = count.clip(0).max(axis=0).astype(int) + 1
    return int(f), int(h), int(w)


def hat_matrix(
    positions: AxisPositions, start: Tensor, axis: int, n: int, footprint: int, dtype: torch.dtype
) -> Tensor:
    """Linear interpolation along one axis as a matrix ``[B, n, footprint]``: two non-zeros a row, which sum to 1."""
    i = torch.arange(n, device=start.device, dtype=torch.float64)
    j = torch.arange(footprint, device=start.device, dtype=torch.float64)
    u = (positions.first[:, axis] - start)[:, None] + i * positions.step[:, axis, None]
    u = u.clamp(0, footprint - 1)
    return (1 - (u[:, :, None] - j).abs()).clamp(min=0).to(dtype)


def footprint_tokens(
    starts: Sequence[Tensor], footprint: Sequence[int], source_grid: Sequence[int], rows: Tensor | None
) -> Tensor:
    """Numbers of the footprints' tokens, ``[B, pf * ph * pw]``, in a source flattened to ``[B_k * N_k, D]``.

    ``rows`` is a column of ``source_index``, ``None`` for row b.
    """
    device = starts[0].device
    f, h, w = (
        start.long()[:, None] + torch.arange(p, device=device) for start, p in zip(starts, footprint, strict=True)
    )
    if rows is None:
        rows = torch.arange(f.shape[0], device=device)
    frame = rows.long()[:, None] * source_grid[0] + f
    line = frame[:, :, None] * source_grid[1] + h[:, None, :]
    token = line[:, :, :, None] * source_grid[2] + w[:, None, None, :]
    return token.flatten(1)
