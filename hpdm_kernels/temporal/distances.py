"""From the embeddings of distances to those of pairs of frames, and back for their gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hpdm_kernels.reference import distance_rows


def of_pairs(table: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
    """``table [2 R + 1, d]`` in ``dtype`` for pairs of frames: at ``[t, s]`` of ``[T, T, d]`` the row of ``s - t``."""
    return table.to(dtype)[distance_rows(table, frames)]


def sum_of_pairs(pairs: Tensor) -> Tensor:
    """``pairs [T, T, d]`` summed over the pairs ``[t, s]`` of each distance ``s - t``: ``[2 T - 1, d]``.

    The order of the sums is fixed. An ``index_add`` would add in any order on a GPU.
    """
    frames = pairs.shape[0]
    # Row T - 1 - t of 2 T entries each, read as rows of 2 T - 1, begins t entries to the left.
    rows = F.pad(pairs.flip(0), (0, 0, 0, frames)).flatten(0, 1)
    return rows[: frames * (2 * frames - 1)].unflatten(0, (frames, -1)).sum(0)


def fold(distances: Tensor, rows: int) -> Tensor:
    """Sums for the distances -(T - 1) .. T - 1, ``[2 T - 1, d]``, to those of a table of ``rows`` rows: ``[rows, d]``.

    Distances beyond the table are added to its ends.
    """
    beyond = (distances.shape[0] - rows) // 2
    if beyond <= 0:
        return F.pad(distances, (0, 0, -beyond, -beyond))
    inner = distances[beyond : beyond + rows].clone()
    inner[0] += distances[:beyond].sum(0)
    inner[-1] += distances[-beyond:].sum(0)
    return inner
