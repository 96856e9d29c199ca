"""Weights of the elements of tiles, one factor per axis, and what share of a voxel each element is.

An average with weights is a sum of tiles, each times its share of the voxel. In a product grid the shares are products
of three numbers, as the weights are:

    out[v] = sum over tiles t of  s_f[t_f, i] * s_h[t_h, j] * s_w[t_w, k] * tiles[t, i, j, k]
    s[t, i] = w[i] / sum over tiles u of the axis that cover o_t + i of w[o_t + i - o_u]

They are computed on the host in fp64, once per set of origins and weights. No product of weights overflows, and where
only one tile covers a voxel its share is exactly 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpdm_kernels._checks import read_values
from hpdm_kernels._transforms import is_mapped
from hpdm_kernels.tiles.geometry import Axis, TilePlan


class Shares(NamedTuple):
    """Shares of the elements of tiles, by the tile's index in the grid and the place in it."""

    table: Tensor
    """``[T_w * w + T_f * f + T_h * h]``, all of them: columns, frames, rows."""
    f: Tensor
    """``[T_f, f]``, a view."""
    h: Tensor
    """``[T_h, h]``, a view."""
    w: Tensor
    """``[T_w, w]``, a view."""

    def of_rows(self, n_f: int, n_h: int) -> Tensor:
        """``[f, h]``: shares of the rows of a tile, without those of the columns."""
        return self.f[n_f][:, None] * self.h[n_h]


def shares(plan: TilePlan, weights: Tensor, dtype: torch.dtype, device: torch.device) -> Shares:
    """The shares of tiles that form a product grid; made once and kept by the plan.

    They are copied from ordinary host memory, which a CUDA graph cannot capture.

    Args:
        plan: a product grid of tiles that cover the whole video.
        weights: ``[f + h + w]`` fp32, one weight per frame, row and column of a tile, on the host.
        dtype, device: of the shares.

    Raises:
        ValueError: weights that are not positive and finite, or that ``vmap`` maps over; no product grid.
    """
    if plan.axes is None:
        raise ValueError("plan: got origins that are no product grid, expected one with axes")
    if is_mapped(weights):
        raise ValueError("weights: got tensors that torch.func.vmap maps over, expected the same weights for all")
    values = read_values(weights)
    key = (values.tobytes(), dtype, device)
    found = plan.tables.get(key)
    if found is None:
        parts = np.split(values.astype(np.float64), np.cumsum([axis.tile for axis in plan.axes])[:-1])
        for n, part in enumerate(parts):
            for at in np.flatnonzero(~(np.isfinite(part) & (part > 0)))[:1]:
                raise ValueError(f"weights[{n}]: got {part[at]} at index {at}, expected positive finite numbers")
        of_axes = [_of_axis(axis, part) for axis, part in zip(plan.axes, parts)]
        order = (2, 0, 1)  # the columns first, so that groups of them are aligned
        flat = torch.from_numpy(np.concatenate([of_axes[n].ravel() for n in order]))
        table = flat.to(device, dtype)
        views = dict(zip(order, table.split([of_axes[n].size for n in order])))
        found = Shares(table, *(views[n].view(of_axes[n].shape) for n in range(3)))
        plan.tables[key] = found
    return found


def _of_axis(axis: Axis, weights: np.ndarray) -> np.ndarray:
    """Shares along an axis, fp64 ``[T, tile]``."""
    total = np.zeros(axis.size)
    for origin in axis.origins:
        total[origin : origin + axis.tile] += weights
    return np.stack([weights / total[origin : origin + axis.tile] for origin in axis.origins])
