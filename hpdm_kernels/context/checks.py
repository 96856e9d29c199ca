"""Validates the arguments of the context ops, and computes footprints from the boxes if these can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdm_kernels._checks import Triple, check_tensor, check_triple, read_values, values_are_readable
from hpdm_kernels.boxes import BOX_SLACK, check_boxes
from hpdm_kernels.context.geometry import POSITION_SLACK, Geometry, needed_footprint


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    """A tuple from a sequence with one entry per source; ``TypeError`` for a single tensor and other values."""
    if isinstance(value, Tensor) or not isinstance(value, (tuple, list, Sequence)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tuple of tensors, one per source")
    return tuple(value)


def check_sources(name: str, sources: object) -> tuple[Any, ...]:
    """Checks that there is at least one source; the sources themselves are not checked yet.

    Raises:
        TypeError: not a sequence.
        ValueError: the sequence is empty.
    """
    sources = _as_tuple(name, sources)
    if not sources:
        raise ValueError(f"{name}: got none, expected at least one tensor [B_k, N_k, D]")
    return sources


def check_weight(weight: object, d: int, like: tuple[str, Tensor]) -> Tensor:
    """Checks a fusion's weight, ``[D, 2D + 3]`` or ``[D, 2D]`` of the dtype and device of ``like``, and returns it."""
    without_coordinates = isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == 2 * d
    return check_tensor("weight", weight, (d, 2 * d if without_coordinates else 2 * d + 3), like=like)


# The parameters are those that the public functions share, and those that tell the functions apart.
def check_context(
    name: str,
    sources: tuple[Any, ...],
    like: tuple[str, Tensor],
    batch: int | str,
    *,
    source_boxes: Sequence[Tensor],
    box: Tensor,
    source_grids: Sequence[Sequence[int]],
    grid: Sequence[int],
    source_index: Tensor | None,
    footprints: Sequence[Sequence[int]] | None,
) -> Geometry:
    """Checks the arguments that the context ops share. Computes missing footprints from the boxes.

    Args:
        name: what the caller calls the sources, for messages.
        sources: result of :func:`check_sources`.
        like: name and value of the tensor ``[.., .., D]`` whose width, dtype and device the others must have.
        batch: the number of boxes, or a letter for any number.
        source_boxes, box, source_grids, grid, source_index, footprints: as for
            :func:`hpdm_kernels.sample_context`.

    Raises:
        TypeError, ValueError: as :func:`hpdm_kernels.sample_context`.
    """
    count = len(sources)
    source_boxes = _as_tuple("source_boxes", source_boxes)
    for argument, value in (("source_boxes", source_boxes), ("source_grids", source_grids), ("footprints", footprints)):
        if value is not None and len(_as_tuple(argument, value)) != count:
            raise ValueError(f"{argument}: got {len(value)} entries, expected {count}, one per source")
    box = check_boxes("box", box, batch, like)
    b, d = box.shape[0], like[1].shape[2]
    size = check_triple("grid", grid)
    sizes = [check_triple(f"source_grids[{k}]", g) for k, g in enumerate(source_grids)]
    if source_index is not None:
        check_tensor(
            "source_index", source_index, (b, count), dtypes=(torch.int32, torch.int64), like=like, same_dtype=False
        )
    for k, (source, source_box, (f, h, w)) in enumerate(zip(sources, source_boxes, sizes)):
        rows: int | str = b if source_index is None else f"B_{k}"
        check_tensor(f"{name}[{k}]", source, (rows, f * h * w, d), like=like)
        check_boxes(f"source_boxes[{k}]", source_box, source.shape[0], like)
    bounds = None if footprints is None else _check_bounds(footprints, sizes)
    geometry = Geometry(source_boxes, box, source_index, sizes, size, bounds or sizes)
    indices = () if source_index is None else (source_index,)
    if not all(map(values_are_readable, (box, *source_boxes, *indices))):
        return geometry
    return geometry._replace(
        footprints=[_read_footprint(geometry, k, None if bounds is None else bounds[k]) for k in range(count)]
    )


def _check_bounds(footprints: Sequence[Sequence[int]], source_grids: Sequence[Triple]) -> list[Triple]:
    """Checks the caller's upper bounds of the footprints: triples, none larger than the source's grid."""
    bounds = [check_triple(f"footprints[{k}]", p) for k, p in enumerate(footprints)]
    for k, (bound, source_grid) in enumerate(zip(bounds, source_grids)):
        if any(p > m for p, m in zip(bound, source_grid)):
            raise ValueError(f"footprints[{k}]: got {bound}, expected at most the source's grid {source_grid}")
    return bounds


def _read_footprint(geometry: Geometry, k: int, bound: Triple | None) -> Triple:
    """The footprint in source ``k``: ``bound`` if given, else what the boxes need. Checks the values of the boxes."""
    inner, outer = read_values(geometry.box), read_values(geometry.source_boxes[k])
    if geometry.source_index is not None:
        rows = read_values(geometry.source_index)[:, k]
        if not 0 <= rows.min() <= rows.max() < outer.shape[0]:
            raise ValueError(
                f"source_index: column {k} is {rows.tolist()}, expected rows of sources[{k}]: 0..{outer.shape[0] - 1}"
            )
        outer = outer[rows]
    (offset, scale), (outer_offset, outer_scale) = np.split(inner, 2, axis=1), np.split(outer, 2, axis=1)
    end, outer_end = offset + scale, outer_offset + outer_scale
    inside = (offset >= outer_offset - BOX_SLACK) & (end <= outer_end + BOX_SLACK)
    if not inside.all():
        row = int((~inside.all(axis=1)).nonzero()[0][0])
        raise ValueError(
            f"box: row {row} is {inner[row].tolist()}, expected inside its box in source_boxes[{k}], "
            f"{outer[row].tolist()}"
        )
    grid, source_grid = geometry.grid, geometry.source_grids[k]
    if bound is None:
        return needed_footprint(inner, outer, grid, source_grid)
    needed = needed_footprint(inner, outer, grid, source_grid, POSITION_SLACK)
    if any(p < q for p, q in zip(bound, needed)):
        raise ValueError(f"footprints[{k}]: got {bound}, expected at least {needed}, what the boxes need")
    return bound
