"""Block sizes of the ops on rows; ``specs`` lists every entry for ahead-of-time compilation.

The interpreter's cost is per program and operation, not per element, so it gets blocks as large as a test's tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from hpdm_kernels._triton import INTERPRETED, cdiv, next_power_of_2


class RowTile(NamedTuple):
    """Rows and columns that a program works on at once, with its number of warps."""

    rows: int
    columns: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The block sizes as kernel arguments."""
        return {"ROWS": self.rows, "BLOCK_D": self.columns}


COLUMNS = RowTile(64, 256, 4) if INTERPRETED else RowTile(4, 256, 4)
"""For kernels that need no whole rows: a thread loads 16 bytes of a row, and has 8 elements of each tensor."""
LEAST_CHUNK, LARGEST_CHUNK = 16, 64
"""Rows that a program sums: more of them write fewer partial sums, fewer of them make more programs."""
ENOUGH_PROGRAMS = 512
"""Programs that keep a large GPU busy. A constant, so that results do not depend on the GPU."""


def whole_rows(width: int) -> RowTile:
    """The tile for kernels that keep whole rows: 8 elements of each tensor per thread, which the backward's sums and
    loads in flight leave registers for; 16 at the widest, and fewer where rows are narrow, of which a tile has 16.
    """
    columns = next_power_of_2(width)
    if INTERPRETED:
        return RowTile(64, columns, 4)
    return RowTile(max(min(2048 // columns, 16), 1), columns, 8)


def chunk_rows(tile: RowTile, rows: int, others: int) -> int:
    """Rows of a sum per program, a multiple of the tile's.

    Args:
        tile: of the kernel.
        rows: number of rows that are summed.
        others: how many such sums there are, by samples and blocks of columns.
    """
    wanted = min(max(rows * others // ENOUGH_PROGRAMS, LEAST_CHUNK), LARGEST_CHUNK)
    return cdiv(wanted, tile.rows) * tile.rows
