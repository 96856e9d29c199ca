"""The kernels' host code without a GPU and without launches: what it allocates, for tensors that have no data.

Inside :func:`launches_left_out` ``backend="triton"`` takes CPU tensors, fake ones too. Block sizes and splits of loops
are those of the GPU that is asked for; results have any values. :mod:`hpdm.planning` counts the workspaces of the
kernels by this, which are thus those that the host code itself allocates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from hpdm_kernels import _triton

TARGET = 90
"""The GPU whose block sizes and processors count by default: H100."""


OnLaunch = Callable[[Any, tuple[Any, ...], Any, dict[str, Any]], None]
"""Takes a kernel, the arguments and the grid of a launch, and its options and named arguments."""


@contextlib.contextmanager
def launches_left_out(target: int = TARGET, on_launch: OnLaunch | None = None) -> Iterator[list[str]]:
    """Inside the block kernels are not launched; yields the names of those that would have been.

    Args:
        target: compute capability of the GPU, 80 or 90. A process with ``TRITON_INTERPRET=1`` has the interpreter's
            block sizes instead.
        on_launch: called in place of each launch.

    Raises:
        RuntimeError: Triton is missing.
        ValueError: unknown target.
    """
    if not _triton.AVAILABLE:
        raise RuntimeError(f"leaving launches out needs Triton, which is not importable ({_triton.IMPORT_ERROR})")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from hpdm_kernels.aot.execution.launch import PROPERTIES

    if target not in PROPERTIES:
        raise ValueError(f"target: got {target}, expected one of {', '.join(map(str, PROPERTIES))}")
    launched: list[str] = []

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.append(kernel.fn.__name__)
        if on_launch is not None:
            on_launch(kernel, arguments, grid, options)

    replacements = (
        (torch.cuda, "get_device_properties", lambda device: PROPERTIES[target]),
        (_triton, "executed", True),
        (JITFunction, "run", run),
        (InterpretedFunction, "run", run),
        (FakeTensor, "data_ptr", _offset),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replacements:
            if name in vars(owner):
                stack.callback(setattr, owner, name, vars(owner)[name])
            else:
                stack.callback(delattr, owner, name)  # inherited until now
            setattr(owner, name, replacement)
        yield launched


def _offset(tensor: Tensor) -> int:
    """The address of a tensor without data, as if its storage began at 0: as aligned as an allocator's."""
    return int(tensor.storage_offset()) * tensor.itemsize
