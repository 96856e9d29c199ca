"""Block sizes and launch options of the attention kernels; ``specs`` lists them for ahead-of-time compilation."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hpdm_kernels._triton import INTERPRETED, VERSION

COMBINE_ROWS = 16
KEY_PAD = 128
"""A multiple of every ``block_n``."""
HEAD_WIDTHS = (32, 64, 128, 256)
"""The widest heads that an entry of a row of the table is for."""


class Tiling(NamedTuple):
    """Block sizes of one kernel, with launch options."""

    block_m: int
    """Queries per block."""
    block_n: int
    """Keys per block."""
    num_warps: int
    num_stages: int
    """1: the kernel itself loads the next block, into registers; else Triton loads that many blocks, less one, ahead
    into shared memory."""
    parts: int = 0
    """The argument ``PARTS`` of the kernel: how many rows of a loaded block a thread holds, at most 4; 0 if products
    take their operands in any layout."""
    programs: int = 1
    """How many programs a multiprocessor holds at once, by registers and shared memory of the compiled kernel: the
    fewest on sm_80, sm_90 and sm_100, with or without masks."""

    @property
    def constexprs(self) -> dict[str, int | bool]:
        """What the kernels take of it."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "PARTS": self.parts, "AHEAD": self.num_stages == 1}


# (kernel, products) -> tilings for the head widths HEAD_WIDTHS. Each uses no stack and fits the shared memory, with and
# without hidden keys (Triton 3.9). At width 64, with 16 bits and one TF32 pass, it is about the fastest one on an H100
# (`python -m benchmarks.gpu.tilings`); elsewhere the largest tested one.
# 3xTF32 has none for the backward at width 256: see `backward_precision`.
# On sm_90 all products of 16 bits and of one TF32 pass run on HGMMA up to width 128. These run on HMMA instead:
# - at width 256 one TF32 pass, and 16 bits in bwd_kv: HGMMA needs blocks of 64 rows, which spill registers;
# - 3xTF32 at width 128 and above, and bwd_kv at width 64: HGMMA needs blocks of 64 rows, which spill registers on sm_80
#   or sm_90;
# - 3xTF32 in bwd_q at every width: blocks of 64 by 16 would fit on HGMMA, but ptxas 12.8.93 (Triton 3.6 and 3.7.1)
#   gives them shared-memory addresses from unset registers. ptxas 12.9.86, 13.1.80 and 13.4.59 do not.
_TILINGS = {
    ("fwd", "16bit"): (
        Tiling(128, 64, 8, 3, programs=2),
        Tiling(128, 64, 8, 3),
        Tiling(128, 64, 8, 3),
        Tiling(64, 64, 8, 2),
    ),
    ("fwd", "tf32"): (
        Tiling(128, 32, 8, 3, programs=2),
        Tiling(128, 64, 8, 1, parts=4),
        Tiling(128, 32, 8, 2, parts=4),
        Tiling(16, 32, 8, 2),
    ),
    ("fwd", "tf32x3"): (Tiling(128, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(32, 32, 8, 2), Tiling(16, 32, 8, 2)),
    ("fwd", "ieee"): (
        Tiling(64, 32, 8, 2, programs=2),
        Tiling(64, 32, 8, 2, programs=2),
        Tiling(16, 32, 8, 2, programs=3),
        Tiling(16, 32, 8, 2),
    ),
    ("bwd_q", "16bit"): (
        Tiling(128, 64, 8, 3, programs=2),
        Tiling(64, 64, 4, 3, programs=2),
        Tiling(64, 64, 8, 2),
        Tiling(64, 32, 8, 2),
    ),
    ("bwd_q", "tf32"): (
        Tiling(128, 64, 8, 2),
        Tiling(128, 64, 8, 3, parts=4),
        Tiling(64, 16, 8, 2, parts=2),
        Tiling(16, 32, 8, 2),
    ),
    ("bwd_q", "tf32x3"): (
        Tiling(16, 64, 4, 2, programs=2),
        Tiling(32, 64, 8, 2),
        Tiling(16, 32, 8, 2),
    ),
    ("bwd_q", "ieee"): (
        Tiling(32, 32, 8, 2, programs=3),
        Tiling(32, 32, 8, 2, programs=3),
        Tiling(64, 16, 8, 2),
        Tiling(32, 32, 8, 2),
    ),
    ("bwd_kv", "16bit"): (
        Tiling(64, 128, 8, 2),
        Tiling(32, 64, 4, 3, programs=2),
        Tiling(64, 64, 8, 2),
        Tiling(64, 32, 8, 2),
    ),
    ("bwd_kv", "tf32"): (
        Tiling(32, 64, 4, 2, parts=2, programs=2),
        Tiling(32, 64, 4, 1, parts=4, programs=2),
        Tiling(16, 64, 8, 2),
        Tiling(16, 16, 8, 1),
    ),
    ("bwd_kv", "tf32x3"): (
        Tiling(16, 64, 4, 2, programs=2),
        Tiling(32, 16, 8, 2),
        Tiling(32, 16, 8, 2),
    ),
    ("bwd_kv", "ieee"): (
        Tiling(64, 32, 8, 2),
        Tiling(32, 32, 8, 2, programs=2),
        Tiling(16, 64, 8, 2),
        Tiling(16, 32, 8, 2),
    ),
}

# GPUs whose blocks have at most so many bytes of shared memory -> (kernel, products, head width) -> tiling.
_WITHIN = {
    # sm_80, and all GPUs with less: one TF32 pass runs on HMMA, which takes operands in any layout, and keeps more in
    # registers.
    166_912: {
        ("fwd", "tf32", 64): Tiling(128, 64, 8, 1),
        ("fwd", "tf32", 128): Tiling(128, 16, 8, 2),
        ("bwd_q", "tf32", 64): Tiling(128, 32, 8, 1),
        ("bwd_q", "tf32", 128): Tiling(32, 32, 8, 2),
        ("bwd_kv", "tf32", 64): Tiling(16, 128, 8, 1),
        ("bwd_kv", "tf32", 128): Tiling(16, 32, 8, 2),
        ("bwd_kv", "tf32", 256): Tiling(16, 16, 8, 2),
    },
    # sm_86, sm_89 and sm_120.
    101_376: {
        ("fwd", "16bit", 256): Tiling(64, 32, 8, 2),
        ("fwd", "tf32", 256): Tiling(16, 16, 8, 2),
        ("fwd", "tf32x3", 256): Tiling(16, 16, 8, 2),
        ("bwd_q", "16bit", 256): Tiling(32, 32, 8, 2),
        ("bwd_q", "tf32", 256): Tiling(16, 16, 8, 2),
        ("bwd_q", "ieee", 256): Tiling(32, 16, 8, 2),
        ("bwd_kv", "16bit", 256): Tiling(32, 32, 8, 2),
    },
}


WHOLE_QUERIES, WHOLE_KEYS = 128, 64
"""Queries and keys of a block of the tilings for whole blocks."""
# Compute capability -> (kernel, products, head width) -> tiling, if all blocks are whole: masks take registers.
_WHOLE_BLOCKS = {90: {("fwd", "tf32", 64): Tiling(WHOLE_QUERIES, WHOLE_KEYS, 4, 3, parts=4, programs=2)}}


class Gpu(NamedTuple):
    """What decides the block sizes on a GPU."""

    capability: int
    """90 for sm_90."""
    shared_memory: int
    """Bytes that a block may use."""


def gpu_tiling(kernel: str, products: str, block_d: int, gpu: Gpu, whole: bool = False) -> Tiling:
    """Block sizes on ``gpu`` of ``kernel`` (``"fwd"``, ``"bwd_q"``, ``"bwd_kv"``).

    Args:
        kernel: the first part of the table's key.
        products: the second part: ``"16bit"``, or the precision of fp32 products.
        block_d: head width, rounded up to a power of two.
        gpu: where the kernel runs.
        whole: queries, keys and head width fill blocks of :data:`WHOLE_QUERIES`, :data:`WHOLE_KEYS` and ``block_d``,
            and no key is hidden.
    """
    index = sum(block_d > width for width in HEAD_WIDTHS)
    key = kernel, products, HEAD_WIDTHS[index]
    tile = _TILINGS[kernel, products][index]
    for limit, tilings in _WITHIN.items():
        if gpu.shared_memory <= limit:
            tile = tilings.get(key, tile)
    if whole:
        tile = _WHOLE_BLOCKS.get(gpu.capability, {}).get(key, tile)
    if products == "tf32" and VERSION < (3, 9) and _stumbles(kernel, block_d, gpu):
        tile = tile._replace(num_stages=1)
    return tile


def _stumbles(kernel: str, block_d: int, gpu: Gpu) -> bool:
    """Whether Triton before 3.9 cannot make asynchronous copies of rows that are rounded in registers afterwards.

    On sm_100 it cannot pipeline inline assembly. Elsewhere it holds such rows twice in shared memory, which is then too
    small for the backward of wide heads, but for sm_90's.
    """
    return gpu.capability // 10 == 10 or (gpu.capability != 90 and kernel != "fwd" and block_d > 64)


def tiling(
    kernel: str, dtype: torch.dtype, precision: str, block_d: int, device: torch.device, whole: bool = False
) -> Tiling:
    """Block sizes of ``kernel`` on ``device``; other arguments as in :func:`gpu_tiling`."""
    if INTERPRETED:  # the interpreter's cost is per iteration, whatever its size: large blocks are fastest
        return Tiling(128, 128, 1, num_stages=1, parts=4) if precision == "tf32" else Tiling(128, 128, 1, num_stages=2)
    properties = torch.cuda.get_device_properties(device)
    gpu = Gpu(properties.major * 10 + properties.minor, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return gpu_tiling(kernel, precision if dtype is torch.float32 else "16bit", block_d, gpu, whole)


def backward_precision(precision: str, block_d: int) -> str:
    """The precision in which the backward computes the fp32 products that the caller wants in ``precision``.

    3xTF32 keeps three parts of its operands in registers, too many for head widths above 128 in any block size. These
    products are computed in fp32, which is slower and rounds less.
    """
    return "ieee" if precision == "tf32x3" and block_d > 128 else precision
