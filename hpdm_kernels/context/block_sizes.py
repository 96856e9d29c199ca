"""Block sizes and launch options of the context kernels; ``specs`` lists every entry for ahead-of-time compilation.

The interpreter's cost is per program and operation, not per element, so it gets blocks as large as a test's tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from hpdm_kernels._triton import INTERPRETED


class Tile(NamedTuple):
    """Block sizes in rows, columns and, for products, the inner dimension, with launch options."""

    rows: int
    columns: int
    inner: int = 0
    num_warps: int = 4
    num_stages: int = 2


class ContextTile(NamedTuple):
    """Block sizes in lines of tokens, tokens per line, columns and, for products, the inner dimension."""

    lines: int
    tokens: int
    columns: int
    inner: int = 0
    num_warps: int = 8
    num_stages: int = 2

    @property
    def blocks(self) -> dict[str, int]:
        """The block sizes as kernel arguments, without the inner dimension."""
        return {"BLOCK_L": self.lines, "BLOCK_W": self.tokens, "BLOCK_D": self.columns}


ROWS = Tile(256, 64) if INTERPRETED else Tile(8, 256)
"""Gathers and scatters of token rows."""
CONTRACT = Tile(256, 64) if INTERPRETED else Tile(4, 256)
"""Transposed interpolation."""
SUMS = Tile(256, 64) if INTERPRETED else Tile(8, 256)
"""Gradients of the coordinates and the bias."""
SUMS_CHUNK = 256
"""Tokens per partial sum of the gradients of the coordinates and the bias."""

INTERPRETED_CONTEXT = ContextTile(32, 8, 64, 64)
INTERPRETED_PRODUCT = Tile(128, 64, 64)

# Keys: bytes per element, and whether rows are aligned to 16 bytes. A thread loads 16 bytes of a row. The 64 tokens of
# a block share source rows in the L1 cache, so that they load few rows from the L2 cache. The blocks leave enough
# registers for 16 warps, whose loads in flight cover the latency of memory.
ADD_CONTEXT = {
    (4, True): ContextTile(8, 4, 128, num_warps=4),
    (2, True): ContextTile(16, 4, 128),
    # Where a thread loads single elements, larger tiles spill registers.
    (4, False): ContextTile(8, 8, 64),
    (2, False): ContextTile(8, 8, 64),
}
# Large blocks: the elements that a product moves through the L2 cache are proportional to 1/M + 1/N.
FUSE_CONTEXT = {
    "ieee": ContextTile(8, 8, 128, 16),
    "tf32x3": ContextTile(16, 8, 128, 16),
    "tf32": ContextTile(16, 8, 128, 32, num_stages=3),
}
# Narrower blocks: the weight's gradient at D = 1024 has 64 blocks of 128 by 128, too few for the multiprocessors of a
# large GPU.
PRODUCT = {
    "ieee": Tile(64, 64, 16, 8, 2),
    "tf32x3": Tile(128, 64, 16, 8, 2),
    "tf32": Tile(128, 64, 32, 8, 3),
}


def add_context_tile(itemsize: int, aligned: bool) -> ContextTile:
    """Blocks for adding the context; ``itemsize`` is the output's. ``aligned``: rows are loaded 16 bytes at a time."""
    return INTERPRETED_CONTEXT if INTERPRETED else ADD_CONTEXT[itemsize, aligned]


def fuse_context_tile(precision: str) -> ContextTile:
    """Blocks for the product of the tokens that is added to the context."""
    return INTERPRETED_CONTEXT if INTERPRETED else FUSE_CONTEXT[precision]


def product_tile(precision: str) -> Tile:
    """Blocks for a plain product."""
    return INTERPRETED_PRODUCT if INTERPRETED else PRODUCT[precision]
