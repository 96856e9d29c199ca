"""Calls of the kernels' host code without a GPU: launches are recorded instead of made.

Triton looks at the arguments of every launch: an integer that is 1 becomes a constant of the kernel, and of other
integers and of pointers it notes whether they are multiples of 16. Launches that differ in this are different
*variants* of a kernel, each compiled when it is first launched. A recorded launch binds its arguments and finds its
variant as a real one does; only compiling and launching are left out.
"""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
from collections.abc import Iterator
from typing import Any, NamedTuple

from hpdm_kernels import _triton, boxes
from hpdm_kernels.context import checks
from hpdm_kernels.dry_run import launches_left_out


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: str
    variant: str
    """Triton's key of the compiled kernel: types, constants, what is a multiple of 16, and options."""
    grid: tuple[int, ...]


def available() -> bool:
    """Whether launches can be recorded: Triton is installed and does not interpret the kernels."""
    return _triton.AVAILABLE and not _triton.INTERPRETED


@functools.cache
def _binder(kernel: Any) -> tuple[Any, dict[Any, str]]:
    """Triton's function that binds and specializes the arguments of ``kernel`` for sm_90, and its memory of keys."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    backend = make_backend(GPUTarget("cuda", 90, 32))
    return jit.create_function_from_signature(kernel.signature, kernel.params, backend), {}


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within the block launches are appended to the list instead of being made; results have any values.

    Tensors on the CPU are treated as if they were on an H100: the kernels take them, and values of boxes are not read.
    """
    from triton.runtime import jit

    launches: list[Launch] = []

    def record(kernel: Any, arguments: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
        bind, keys = _binder(kernel)
        _, specialization, rest = bind(*arguments, **options)
        launches.append(Launch(kernel.__name__, jit.compute_cache_key(keys, specialization, rest), grid))

    with (
        launches_left_out(on_launch=record),
        unittest.mock.patch.object(boxes, "values_are_readable", _no),
        unittest.mock.patch.object(checks, "values_are_readable", _no),
    ):
        yield launches


def _no(*_: object) -> None:
    """The answer to whether values can be read."""
