"""Validation of the context ops, and the size of the footprints where it can be read from the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdm_kernels import _checks
from hpdm_kernels.context import geometry as context_geometry


def flatten_triples(triples: Sequence[Sequence[int]]) -> list[int]:
    """One flat list, because the schema of an op has no nested lists."""
    return [n for triple in triples for n in triple]


def as_tuple(name: str, value: object) -> tuple[Any, ...]:
    """A tuple from a sequence with one entry per source; ``TypeError`` for a single tensor and other values."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tuple of tensors, one per source")
    return tuple(value)


def check_context(
    sources: tuple[Any, ...],
    source_boxes: tuple[Any, ...],
    box: object,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None,
    footprints: Sequence[Sequence[int]] | None,
    like: tuple[str, Tensor],
    b: int | str,
    name: str = "sources",
) -> tuple[list[tuple[int, int, int]], tuple[int, int, int], list[tuple[int, int, int]]]:
    """Checks what the functions share; returns source grids, grid and footprints as tuples.

    ``name`` is what the caller calls the sources.
    """
    count, d = len(sources), like[1].shape[2]
    if count == 0:
        raise ValueError(f"{name}: got none, expected at least one tensor [B_k, N_k, D]")
    for other, value in (("source_boxes", source_boxes), ("source_grids", source_grids), ("footprints", footprints)):
        if value is not None and len(as_tuple(other, value)) != count:
            raise ValueError(f"{other}: got {len(value)} entries, expected {count}, one per source")
    box = _checks.check_boxes("box", box, b, like)
    b = box.shape[0]
    grid = _checks.check_triple("grid", grid)
    grids = [_checks.check_triple(f"source_grids[{k}]", g) for k, g in enumerate(source_grids)]
    if source_index is not None:
        _checks.check_tensor(
            "source_index", source_index, (b, count), dtypes=(torch.int32, torch.int64), like=like, same_dtype=False
        )
    for k, (source, source_box, (f, h, w)) in enumerate(zip(sources, source_boxes, grids)):
        rows: int | str = b if source_index is None else f"B_{k}"
        _checks.check_tensor(f"{name}[{k}]", source, (rows, f * h * w, d), like=like)
        _checks.check_boxes(f"source_boxes[{k}]", source_box, source.shape[0], like)
    bounds = None
    if footprints is not None:
        bounds = [_checks.check_triple(f"footprints[{k}]", p) for k, p in enumerate(footprints)]
        for k, (bound, source_grid) in enumerate(zip(bounds, grids)):
            if any(p > m for p, m in zip(bound, source_grid)):
                raise ValueError(f"footprints[{k}]: got {bound}, expected at most the source's grid {source_grid}")
    if not all(map(_checks.values_are_readable, (box, *source_boxes))):
        return grids, grid, bounds or grids
    read = [
        _read_footprint(k, source_boxes[k], box, grids[k], grid, source_index, None if bounds is None else bounds[k])
        for k in range(count)
    ]
    return grids, grid, read


def _read_footprint(
    k: int,
    source_box: Tensor,
    box: Tensor,
    source_grid: tuple[int, int, int],
    grid: tuple[int, int, int],
    source_index: Tensor | None,
    bound: tuple[int, int, int] | None,
) -> tuple[int, int, int]:
    """The footprint in source k, the bound or else what values on the CPU give, after checking these."""
    if source_index is not None:
        rows = source_index[:, k]
        if not 0 <= int(rows.min()) <= int(rows.max()) < source_box.shape[0]:
            raise ValueError(
                f"source_index: column {k} is {rows.tolist()}, expected rows of sources[{k}]: "
                f"0..{source_box.shape[0] - 1}"
            )
        source_box = source_box[rows]
    # In numpy, as in check_boxes: the same in PyTorch was a quarter of fusing a small batch of tiles.
    inner, outer = box.detach().numpy(), source_box.detach().numpy()
    (low, size), (from_, room) = np.split(inner, 2, axis=1), np.split(outer, 2, axis=1)
    inside = (low >= from_ - _checks.BOX_SLACK) & (low + size <= from_ + room + _checks.BOX_SLACK)
    if not inside.all():
        row = int((~inside.all(axis=1)).nonzero()[0][0])
        raise ValueError(
            f"box: row {row} is {box[row].tolist()}, expected inside its box in source_boxes[{k}], "
            f"{source_box[row].tolist()}"
        )
    if bound is None:
        return context_geometry.needed_footprint(inner, outer, grid, source_grid)
    needed = context_geometry.needed_footprint(inner, outer, grid, source_grid, context_geometry.POSITION_SLACK)
    if any(p < q for p, q in zip(bound, needed)):
        raise ValueError(f"footprints[{k}]: got {bound}, expected at least {needed}, what the boxes need")
    return bound
