"""Block sizes of group normalization; ``specs`` lists every entry for ahead-of-time compilation.

The interpreter's cost is per program and operation, not per element, so it gets blocks as large as a test's tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from hpdm_kernels._triton import INTERPRETED, cdiv, next_power_of_2


class Tile(NamedTuple):
    """Rows and channels that a program works on at once; it goes through a chunk of rows, tile by tile."""

    rows: int
    channels: int
    num_warps: int = 4

    @property
    def blocks(self) -> dict[str, int]:
        """The block sizes as kernel arguments."""
        return {"ROWS": self.rows, "BLOCK_C": self.channels}


WIDEST = 256
"""Most channels of a tile: a thread loads 16 bytes of a row, and has 8 elements of each tensor."""
LEAST_CHUNK, LARGEST_CHUNK = 16, 256
"""Rows of a program: more of them write fewer partial sums, fewer of them make more programs."""
ENOUGH_PROGRAMS = 512
"""Programs that keep a large GPU busy. A constant, so that results do not depend on the GPU."""
CELLS = 64 if INTERPRETED else 1024
"""Moments that a program merges at once."""
GROUP_CHANNELS = 64
"""Channels of a group whose sums a program takes at once."""


def tile_of(channels: int, narrow: bool = False) -> Tile:
    """The tile for rows of so many channels.

    Args:
        channels: of a row.
        narrow: half as many numbers per thread, for the backward of repeated edges in fp32, which needs registers for
            addresses.
    """
    width = min(next_power_of_2(channels), WIDEST)
    return Tile(64 if INTERPRETED else (512 if narrow else 1024) // width, width)


def chunk_rows(tile: Tile, rows: int, others: int) -> int:
    """Rows of a program, a multiple of the tile's.

    Args:
        tile: of the kernel.
        rows: number of rows of a frame.
        others: how many such frames there are, times blocks of channels.
    """
    wanted = min(max(rows * others // ENOUGH_PROGRAMS, LEAST_CHUNK), LARGEST_CHUNK)
    return cdiv(wanted, tile.rows) * tile.rows
