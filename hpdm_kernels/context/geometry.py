"""Where a patch's tokens fall in the tokens of its sources: per axis, per sample, in closed form.

Boxes are axis-aligned, so everything about trilinear sampling factors over the three axes. Token ``i`` of ``n`` sits at

    u_i = first + i * step,    step = s * m / n,    first = (o + s * 0.5 / n) * m - 0.5

in units of the ``m`` tokens of the source, where ``(o, s)`` is the box relative to the source's box (paper eq. 8). The
*footprint* is the contiguous range of ``p <= m`` source tokens that a patch touches; it begins at ``start``. In local
coordinates ``u_i - start``, clamping to ``[0, p - 1]`` is the border padding, and the weight of footprint token ``j``
is the hat function ``max(0, 1 - |u_i - j|)``. ``start`` may differ between samples, but ``p`` may not, because it is a
shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpdm_kernels._checks import Triple, flatten_triples, triples
from hpdm_kernels.boxes import relative_box

FloatArray = npt.NDArray[np.floating]

# Rounding error of a position, as a fraction of the source, since boxes are fp32.
POSITION_SLACK = 4 * torch.finfo(torch.float32).eps


class Geometry(NamedTuple):
    """Where a batch of ``B`` patches reads its ``K`` sources: validated arguments of the context ops."""

    source_boxes: Sequence[Tensor]
    """``K`` tensors ``[B_k, 6]``."""
    box: Tensor
    """``[B, 6]``, the patches' boxes."""
    source_index: Tensor | None
    """``[B, K]``, the row of source ``k`` that sample ``b`` reads; ``None``: sample ``b`` reads row ``b``."""
    source_grids: Sequence[Triple]
    """``K`` triples, tokens of each source per axis."""
    grid: Triple
    """Tokens of a patch per axis."""
    footprints: Sequence[Triple]
    """``K`` triples: numbers of source tokens that a patch touches per axis, or upper bounds of them."""

    @classmethod
    def from_flat(
        cls,
        source_boxes: Sequence[Tensor],
        box: Tensor,
        source_index: Tensor | None,
        source_grids: Sequence[int],
        grid: Sequence[int],
        footprints: Sequence[int],
    ) -> Geometry:
        """Builds a geometry from the arguments of a registered op, whose lists of triples are flat."""
        f, h, w = grid
        return cls(source_boxes, box, source_index, triples(source_grids), (f, h, w), triples(footprints))

    def flat(self) -> tuple[Any, ...]:
        """The arguments of :meth:`from_flat`."""
        grids, footprints = flatten_triples(self.source_grids), flatten_triples(self.footprints)
        return self.source_boxes, self.box, self.source_index, grids, list(self.grid), footprints

    @property
    def footprint_rows(self) -> list[int]:
        """``B * P_k``: number of tokens of all samples' footprints, for each source."""
        batch = self.box.shape[0]
        return [batch * f * h * w for f, h, w in self.footprints]

    def rows_of_source(self, k: int) -> Tensor | None:
        """``[B]``, the row of source ``k`` that each sample reads; ``None``: sample ``b`` reads row ``b``."""
        return None if self.source_index is None else self.source_index[:, k]


def footprint_size(relative_scale: float, n: int, n_source: int) -> int:
    """Upper bound of the number of source tokens that ``n`` tokens of a patch touch along one axis.

    The first and the last token are ``d = relative_scale * n_source * (n - 1) / n`` source tokens apart. Their lower
    neighbors are at most ``ceil(d)`` apart, whatever the offset. The tokens between these, both included, and one upper
    neighbor are read: ``ceil(d) + 2`` tokens, but at most ``n_source``.

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


def needed_footprint(
    box: FloatArray, source_box: FloatArray, grid: Sequence[int], source_grid: Sequence[int], slack: float = 0.0
) -> Triple:
    """Number of source tokens that boxes ``[B, 6]`` touch per axis, the maximum over samples; in numpy.

    ``slack``, as a fraction of the source, excludes an upper neighbor that is touched only by rounding.
    """
    box, source_box = box.astype(np.float64), source_box.astype(np.float64)
    n, m = np.array(grid), np.array(source_grid)
    offset, scale = (box[:, :3] - source_box[:, :3]) / source_box[:, 3:], box[:, 3:] / source_box[:, 3:]
    first = (offset + scale * (0.5 / n)) * m - 0.5
    last = first + (n - 1) * (scale * (m / n)) - slack * m
    # The upper neighbor of a position is the lowest token that is not below it.
    count = np.ceil(last.clip(0, m - 1)) - np.floor(first.clip(0, m - 1))
    f, h, w = count.clip(0).max(axis=0).astype(int) + 1
    return int(f), int(h), int(w)


class Positions(NamedTuple):
    """Positions of a patch's tokens in one source, for the three axes of every sample; all are ``[B, 3]`` float64."""

    first: Tensor
    """Position of token 0, in source tokens; below 0 or above ``m - 1`` it is clamped to the border."""
    step: Tensor
    """Distance of neighboring tokens, in source tokens."""
    start: Tensor
    """First token of the footprint (an integer), chosen so that the footprint lies inside the source's grid."""


def source_positions(geometry: Geometry, k: int) -> Positions:
    """Positions in source ``k``, in fp64: cheap for so few numbers, and only the final conversion to fp32 rounds."""
    rows, source_box = geometry.rows_of_source(k), geometry.source_boxes[k]
    relative = relative_box(geometry.box.double(), (source_box if rows is None else source_box[rows]).double())
    first, step, start = [], [], []
    for a, (n, m, p) in enumerate(zip(geometry.grid, geometry.source_grids[k], geometry.footprints[k])):
        offset, scale = relative[:, a], relative[:, 3 + a]
        first.append((offset + scale * (0.5 / n)) * m - 0.5)
        step.append(scale * (m / n))
        start.append(first[a].floor().clamp(0, m - p))
    return Positions(torch.stack(first, 1), torch.stack(step, 1), torch.stack(start, 1))


def hat_matrix(positions: Positions, axis: int, n: int, footprint: int, dtype: torch.dtype) -> Tensor:
    """Linear interpolation along one axis as a matrix ``[B, n, footprint]``; one or two non-zeros per row, of sum 1."""
    first, step, start = (t[:, axis] for t in positions)  # [B]
    i = torch.arange(n, device=start.device, dtype=torch.float64)
    j = torch.arange(footprint, device=start.device, dtype=torch.float64)
    u = (first - start)[:, None] + i * step[:, None]  # [B, n]
    u = u.clamp(0, footprint - 1)
    return (1 - (u[:, :, None] - j).abs()).clamp(min=0).to(dtype)


def footprint_index(
    positions: Positions, footprint: Sequence[int], source_grid: Sequence[int], rows: Tensor | None
) -> Tensor:
    """Indices of the footprints' tokens, ``[B, pf * ph * pw]``, in a source flattened to ``[B_k * N_k, D]``.

    ``rows [B]`` is the row of the source that each sample reads; ``None``: sample ``b`` reads row ``b``.
    """
    starts, device = positions.start.long(), positions.start.device
    f, h, w = (starts[:, a, None] + torch.arange(p, device=device) for a, p in enumerate(footprint))  # [B, p]
    if rows is None:
        rows = torch.arange(f.shape[0], device=device)
    frame = rows.long()[:, None] * source_grid[0] + f  # [B, pf]
    line = frame[:, :, None] * source_grid[1] + h[:, None, :]  # [B, pf, ph]
    token = line[:, :, :, None] * source_grid[2] + w[:, None, None, :]  # [B, pf, ph, pw]
    return token.flatten(1)
