"""Block sizes of the tile kernels.

A group is ``VECTOR`` neighboring columns, which a thread loads together: 16 bytes of the largest dtype, or one column
if something is not aligned. With more, the threads of a warp would load every other 16 bytes of that dtype. The
interpreter's cost is per program and operation, not per pixel, so it gets large blocks.
"""

from __future__ import annotations

from hpdm_kernels._triton import INTERPRETED, next_power_of_2

THREADS = 128
MOST_GROUPS = 64
"""Groups of a row in one program: a warp then loads from one row, as long as rows are wide enough."""


def _blocks(rows: int, width: int, vector: int, groups: int) -> dict[str, int]:
    """Blocks of ``groups`` groups, in rows that are not much longer than ``width`` columns."""
    block_w = next_power_of_2(width) // vector
    if INTERPRETED:
        block_w, block_r = min(block_w, 256), 256
    else:
        block_w = min(block_w, MOST_GROUPS if vector > 1 else THREADS)
        block_r = groups // block_w
    return {"VECTOR": vector, "BLOCK_R": min(block_r, next_power_of_2(rows)), "BLOCK_W": block_w}


def extract_blocks(rows: int, width: int, vector: int) -> dict[str, int]:
    """Blocks for tiles of ``rows`` rows, of all frames and channels, and ``width`` columns: one group per thread.

    With two, 16-bit tiles take twice as long on an H100; with four, fp32 tiles three times.
    """
    return _blocks(rows, width, vector, THREADS if vector > 1 else 2 * THREADS)


def average_blocks(rows: int, width: int, vector: int) -> dict[str, int]:
    """Blocks for frames of ``rows`` rows and ``width`` columns: two groups per thread.

    With one, fp32 tiles take a quarter longer on an H100.
    """
    return _blocks(rows, width, vector, 2 * THREADS)
