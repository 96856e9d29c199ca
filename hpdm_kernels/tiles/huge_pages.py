"""Allocates large results in host memory on huge pages.

glibc maps new memory for a large tensor. Its page faults, one per 4 KB, take longer than writing the tensor; huge pages
avoid most of them. PyTorch requests huge pages only with ``THP_MEM_ALLOC_ENABLE=1``, and then for every tensor; this
module requests them only for the results of tile ops.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

# glibc gives allocations of at least this size their own mapping (DEFAULT_MMAP_THRESHOLD_MAX) and returns it to the
# system when it is freed, so the advice affects no other memory.
OWN_MAPPING = 32 << 20


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise`` on systems with transparent huge pages (Linux), else ``None``."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def new_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(shape, dtype=dtype)``; large tensors in host memory are on huge pages if the system has them."""
    out = like.new_empty(shape, dtype=dtype)
    madvise = _madvise()
    if madvise and out.device.type == "cpu" and out.nbytes >= OWN_MAPPING:
        start = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        # The return value is ignored: if the system cannot follow the advice, it gives ordinary pages.
        madvise(start, out.data_ptr() + out.nbytes - start, mmap.MADV_HUGEPAGE)
    return out
