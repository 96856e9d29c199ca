"""The one place that imports Triton, and the description of a kernel for ahead-of-time compilation.

Triton is optional at import time: without it the ``reference`` and ``torch`` backends still work. Whether kernels
are interpreted on the CPU is decided when ``@triton.jit`` decorates, hence once per process, by ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

# Products and sums may be contracted, Triton's own default, which newer versions want to be told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    IMPORT_ERROR = ""
except ImportError as error:
    triton = None
    tl = None
    AVAILABLE = False
    IMPORT_ERROR = str(error)

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "0") == "1"


def jit(fn: Any) -> Any:
    """``triton.jit``, or the bare function where Triton is missing (it is then never launched)."""
    return triton.jit(fn) if AVAILABLE else fn


@dataclass(frozen=True)
class KernelSpec:
    """One kernel in one configuration, as ``triton.compile`` wants it without a GPU.

    Each op module lists its own in ``aot_specs()``: every kernel, every entry of its table of block sizes, every dtype.
    """

    name: str
    """Unique and readable: ``cross_attention_fwd[fp32,tf32,d64]``."""
    fn: Any
    """The ``@jit`` function."""
    signature: dict[str, str]
    """Argument name to Triton type: ``"*fp32"``, ``"i32"``, ``"i64"``, ``"fp32"``; ``"constexpr"`` for constexprs."""
    constexprs: dict[str, Any] = field(default_factory=dict)
    """Values of the constexpr arguments."""
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    """Arguments divisible by 16 (pointers from the allocator, strides of common shapes)."""
