"""Cuts clips into pieces that fit into a cache, by what has statistics of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

Unit = tuple[slice, slice]
"""Samples and frames of ``[B, T, H, W, C]``."""
Piece = tuple[slice, slice, slice]
"""Samples, frames and rows of pixels."""


def units(shape: Sequence[int], per_clip: bool, size: int) -> Iterator[tuple[Unit, list[Piece]]]:
    """Samples and frames of each unit, and its pieces, none of which has more frames than the first.

    Args:
        shape: ``[B, T, H, W, C]``.
        per_clip: whether a unit is a clip; else it is a frame. Several of them are one unit where a piece has room.
        size: about how many elements a piece has; at least a row of pixels.
    """
    batch, frames, height, width, channels = shape
    row = width * channels
    frame = height * row
    if frames * frame <= size:
        samples = size // (frames * frame)
        for b in range(0, batch, samples):
            unit = slice(b, min(b + samples, batch)), slice(0, frames)
            yield unit, [(*unit, slice(0, height))]
        return
    count = max(size // frame, 1)
    step = height if frame <= size else max(size // row, 1)
    for b in range(batch):
        of_clip: list[Piece] = []
        for t in range(0, frames, count):
            unit = slice(b, b + 1), slice(t, min(t + count, frames))
            pieces = [(*unit, slice(h, min(h + step, height))) for h in range(0, height, step)]
            of_clip += pieces
            if not per_clip:
                yield unit, pieces
        if per_clip:
            yield (slice(b, b + 1), slice(0, frames)), of_clip


def of_unit(t: Tensor, unit: Unit, shape: Sequence[int]) -> Unit:
    """Where the entries of a unit are in ``t [B or 1, T or 1, ..]``; an axis of size 1 is the same for all."""
    return tuple(part if n == size else slice(0, 1) for part, n, size in zip(unit, t.shape, shape))  # type: ignore[return-value]
