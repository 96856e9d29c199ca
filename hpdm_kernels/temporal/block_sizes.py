"""Block sizes of the kernels of temporal attention; ``specs`` lists entries of all kinds for ahead-of-time compilation.

Tiles are ``[frames, positions, channels]``: the channels and positions go to threads, so that a sum over frames stays
within a thread.
"""

from __future__ import annotations

from typing import NamedTuple

from hpdm_kernels._triton import INTERPRETED, cdiv, next_power_of_2

LARGEST_TILE = 4096
"""Numbers of keys of one position that a program can hold: frames times channels, each a power of two."""
PER_THREAD, PER_THREAD_BACKWARD = 32, 8
"""Numbers of keys that a thread holds, and as many of values; backward their gradients beside them.

With 8 a thread takes at most 168 registers, so that several programs share a multiprocessor. With 16 it took all 255.
"""
ENOUGH_PROGRAMS = 512
"""Programs that keep a large GPU busy. A constant, so that results do not depend on the GPU."""


class Tile(NamedTuple):
    """Frames, positions and channels that a program holds, with its number of warps."""

    frames: int
    positions: int
    channels: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The block sizes as kernel arguments."""
        return {"BLOCK_T": self.frames, "BLOCK_N": self.positions, "BLOCK_D": self.channels}


def _padded(frames: int, width: int) -> tuple[int, int]:
    return max(next_power_of_2(frames), 4), max(next_power_of_2(width), 16)


def obstacle(frames: int, width: int) -> str | None:
    """Why no kernel can take so many frames and so wide heads; ``None`` if it can."""
    t, d = _padded(frames, width)
    if t * d <= LARGEST_TILE:
        return None
    return (
        f"{frames} frames of {width} channels per head are {t} x {d} numbers, the kernels hold at most {LARGEST_TILE}"
    )


def tile(frames: int, width: int, backward: bool) -> Tile:
    """The tile for sequences of ``frames`` and heads of ``width``, within :data:`LARGEST_TILE`."""
    t, d = _padded(frames, width)
    if INTERPRETED:  # its cost is per program and operation, not per element
        return Tile(t, 64, d, 4)
    held = PER_THREAD_BACKWARD if backward else PER_THREAD
    # Four warps where that suffices: several programs share a multiprocessor, and some load while others compute.
    positions = max(4 * 32 * held // (t * d), 1)
    return Tile(t, positions, d, t * positions * d // (32 * held))


def chunk_positions(block: int, positions: int, others: int) -> int:
    """Positions that a program of the backward goes through, a multiple of its ``block``.

    Args:
        block: positions of a tile.
        positions: number of positions.
        others: for how many samples and heads there are programs.
    """
    return max(cdiv(cdiv(positions, block) * others, ENOUGH_PROGRAMS), 1) * block
