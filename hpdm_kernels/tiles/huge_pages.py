"""Fresh host memory for large results, on huge pages.

What glibc maps anew for a large tensor is faulted in 4 KB at a time, which takes longer than writing it: 36 ms for the
113 MB of a 64x288x512 video, 249 ms for its 3375 half-overlapping tiles, against 7 and 46 ms on huge pages (2 cores of
an AMD EPYC, written with ``zero_``). PyTorch asks for huge pages only with ``THP_MEM_ALLOC_ENABLE=1``, and then for
every tensor; here it is asked for the results of tiles alone.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# From here on glibc gives an allocation a mapping of its own (DEFAULT_MMAP_THRESHOLD_MAX), which goes back to the
# system when it is freed: the advice touches nobody else's memory.
OWN_MAPPING = 32 << 20


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``, where there are transparent huge pages (Linux)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def new_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``; a large one in host memory lies on huge pages, if there are some."""
    out = like.new_empty(shape, dtype=dtype)
    madvise = _madvise()
    if madvise and out.device.type == "cpu" and out.nbytes >= OWN_MAPPING:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # Advice: a system that does not take it says so and gives ordinary pages.
        madvise(start, out.data_ptr() + out.nbytes - start, mmap.MADV_HUGEPAGE)
    return out
