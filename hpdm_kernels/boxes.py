"""Boxes: where patches lie in a video. Every op and the model use the convention that is defined here.

A box is a row of six numbers, ``(offset f, h, w, scale f, h, w)``, in fractions of the whole video: on each axis it
covers ``[offset, offset + scale]`` within ``[0, 1]``. Boxes ``[B, 6]`` are float32 whatever the dtype of the data.
Axes are always in the order frames, height, width, and tokens are flattened with the width fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._checks import check_tensor, read_values, values_are_readable

BOX_SLACK = 1e-5
"""Allowed overshoot of a box's edges, since boxes are built in fp32 by adding fractions, which rounds."""


def coordinate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates and of sums for data of ``dtype``: fp64 for fp64, else fp32.

    16-bit coordinates are too coarse to tell neighboring tokens apart.
    """
    return torch.float64 if dtype is torch.float64 else torch.float32


def token_positions(offset: Tensor, scale: Tensor, n: int) -> Tensor:
    """Centers of a box's ``n`` tokens along one axis, ``offset + scale * (i + 0.5) / n``.

    Args:
        offset: ``[B]``, start of the box on this axis.
        scale: ``[B]``, extent of the box on this axis.
        n: number of tokens.

    Returns:
        ``[B, n]`` in the unit and dtype of ``offset``.
    """
    i = torch.arange(n, device=offset.device, dtype=offset.dtype)
    return offset[:, None] + scale[:, None] * ((i + 0.5) / n)


def token_coordinates(box: Tensor, grid: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Absolute coordinates (f, h, w) of a patch's tokens in the whole video, paper eq. 9.

    Args:
        box: ``[B, 6]``.
        grid: tokens of the patch per axis, (F, H, W).
        dtype: dtype of the result; computed in :func:`coordinate_dtype` of it.

    Returns:
        ``[B, F * H * W, 3]``.
    """
    box = box.to(coordinate_dtype(dtype))
    axes = [token_positions(box[:, a], box[:, 3 + a], grid[a]) for a in range(3)]
    f, h, w = grid
    b = box.shape[0]
    c = torch.stack(
        (
            axes[0][:, :, None, None].expand(b, f, h, w),
            axes[1][:, None, :, None].expand(b, f, h, w),
            axes[2][:, None, None, :].expand(b, f, h, w),
        ),
        dim=-1,
    )
    return c.reshape(b, f * h * w, 3).to(dtype)


def relative_box(box: Tensor, parent: Tensor) -> Tensor:
    """``box`` in units of ``parent``, paper eq. 8: ``[B, 6], [B, 6] -> [B, 6]``."""
    return torch.cat(((box[:, :3] - parent[:, :3]) / parent[:, 3:], box[:, 3:] / parent[:, 3:]), dim=1)


def check_boxes(name: str, boxes: object, rows: int | str, like: tuple[str, Tensor]) -> Tensor:
    """Checks boxes and returns them: ``[rows, 6]`` float32, offset >= 0, scale > 0 and offset + scale <= 1.

    Args:
        name: the argument's name, for messages.
        boxes: what the caller passed.
        rows: the expected number of boxes, or a letter for any number >= 1.
        like: ``(name, tensor)`` whose device the boxes must be on.

    Raises:
        TypeError: not a tensor, or not float32.
        ValueError: a wrong shape or device; on the CPU also a box outside the video.
    """
    boxes = check_tensor(name, boxes, (rows, 6), dtypes=(torch.float32,), like=like, same_dtype=False)
    if values_are_readable(boxes):
        values = read_values(boxes)
        offset, scale = values[:, :3], values[:, 3:]
        valid = (scale > 0) & (offset >= -BOX_SLACK) & (offset + scale <= 1 + BOX_SLACK)
        if not valid.all():
            row = int((~valid.all(axis=1)).nonzero()[0][0])
            raise ValueError(
                f"{name}: row {row} is {values[row].tolist()}, expected (offset, scale) inside the whole video: "
                "offset >= 0, scale > 0, offset + scale <= 1 on every axis"
            )
    return boxes
