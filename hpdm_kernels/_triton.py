"""Imports Triton if it is installed, and defines what all kernels and their launchers share.

No other module imports Triton. Without it the ``reference`` and ``torch`` backends still work. ``@triton.jit`` reads
``TRITON_INTERPRET`` when it decorates a kernel, so whether kernels are interpreted on the CPU is fixed per process.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# Fused multiply-add is Triton's own default, but newer versions warn if it is not set.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
    IMPORT_ERROR = ""
    VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
except ImportError as error:
    triton = None
    tl = None
    AVAILABLE = False
    IMPORT_ERROR = str(error)
    VERSION = (0, 0)

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "0") == "1"

executed = False
"""Whether launches on CPU tensors execute the compiled kernels; :mod:`hpdm_kernels.aot.execution` sets this."""


SHARED_MEMORY_LIMITS = {
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376,
}  # fmt: skip
"""Bytes of shared memory that one block may use, of every GPU that the kernels are made for.

``sm_80`` is A100; ``sm_86``, ``sm_89`` and ``sm_120`` are GeForce and workstation cards from RTX 30 on, A10, L4, L40S;
``sm_90`` is H100 and H200, ``sm_100`` B200. Triton does not check the limit when it compiles ahead of time.
"""


def jit(fn: Any) -> Any:
    """``triton.jit``; without Triton the undecorated function, which is then never launched."""
    return triton.jit(fn) if AVAILABLE else fn


def kernel(*, specialize: Sequence[str] = ()) -> Callable[[Any], Any]:
    """:func:`jit` for a kernel that is compiled once for all sizes.

    Triton compiles another variant of a kernel whenever an integer argument is 1 or a multiple of 16, although few
    arguments make better code by this: widths and strides, because of which a thread may load 16 bytes at a time.

    Args:
        specialize: names of the integer arguments that make variants.
    """

    def decorate(fn: Any) -> Any:
        if not AVAILABLE:
            return fn
        arguments = inspect.signature(fn).parameters.values()
        numbers = [a.name for a in arguments if a.annotation is inspect.Parameter.empty and not a.name.endswith("_ptr")]
        return triton.jit(fn, do_not_specialize=[name for name in numbers if name not in specialize])

    return decorate


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. Triton's own function is for kernels, too, and takes microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n >= 1``."""
    return 1 << (n - 1).bit_length()


MAX_PROGRAMS = 2**31 - 1
"""CUDA's limit on the first axis of a grid. That of the second and third axis is 65,535."""


def launch_grid(*counts: int) -> tuple[int]:
    """The grid of a launch with ``counts[0] * counts[1] * ...`` programs, all on the first axis.

    Sizes of a caller's tensors never go on the other axes, which CUDA limits to 65,535 programs.

    Raises:
        ValueError: more programs than :data:`MAX_PROGRAMS`.
    """
    programs = math.prod(counts)
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"tensors: got sizes that need {' x '.join(map(str, counts))} = {programs} programs of one kernel, "
            f"expected at most {MAX_PROGRAMS}; use a smaller batch"
        )
    return (programs,)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel in one configuration: what ``triton.compile`` needs to compile it without a GPU.

    Each op family lists its specs in ``aot_specs()``: every kernel with every entry of its table of block sizes and
    every dtype.
    """

    name: str
    """Readable, and unique among the specs for a GPU: ``cross_attention_fwd[fp32,tf32,d64]``."""
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
    targets: tuple[str, ...] = ()
    """The GPUs that this configuration is for, keys of :data:`SHARED_MEMORY_LIMITS`; none means all of them."""
