"""What group normalization does besides its tensors, and the sizes that follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hpdm_kernels._checks import Triple


class Form(NamedTuple):
    """The settings of a call."""

    groups: int
    """Number of groups of channels."""
    per_clip: bool
    """Whether statistics are over all frames of a clip; else over those of a frame."""
    silu: bool
    """Whether SiLU follows."""
    pad: Sequence[int]
    """How often the first and the last position of each axis are repeated: six numbers, front and back of T, H, W."""

    @property
    def front(self) -> Triple:
        """Where the input begins in the padded result."""
        return self.pad[0], self.pad[2], self.pad[4]

    @property
    def is_padded(self) -> bool:
        """Whether any edge is repeated."""
        return any(self.pad)

    def padded(self, shape: Sequence[int]) -> tuple[int, int, int, int, int]:
        """The shape of the result for an input ``[B, T, H, W, C]``."""
        b, *sizes, c = shape
        t, h, w = (n + front + back for n, front, back in zip(sizes, self.pad[::2], self.pad[1::2]))
        return b, t, h, w, c

    def statistics(self, shape: Sequence[int]) -> Triple:
        """The shape of mean and deviation: samples, frames with statistics of their own, groups."""
        return shape[0], 1 if self.per_clip else shape[1], self.groups

    def edges(self, shape: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """Axis of ``[B, T, H, W, C]``, repeated positions in front, size, repeated positions behind; axes that have."""
        for axis in (1, 2, 3):
            front, back = self.pad[2 * axis - 2 : 2 * axis]
            if front or back:
                yield axis, front, shape[axis], back
