"""Executes the library's launches on CPU tensors, in place of a GPU's driver.

Inside :func:`executing` Triton compiles every launched kernel for a GPU that need not be present, with the very
specialization that it would choose there, and :mod:`hpdm_kernels.aot.execution.machine` executes the PTX on the tensors
where they lie.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels import _triton
from hpdm_kernels.aot.execution.counts import Counts
from hpdm_kernels.aot.execution.global_memory import GlobalMemory, fill_unwritten
from hpdm_kernels.aot.execution.machine import Machine
from hpdm_kernels.aot.execution.program import parse

TARGETS = (80, 90)
"""Compute capabilities whose PTX can be executed."""


PROPERTIES = {
    target: SimpleNamespace(
        major=target // 10,
        minor=target % 10,
        multi_processor_count=processors,
        shared_memory_per_block_optin=_triton.SHARED_MEMORY_LIMITS[f"sm_{target}"],
    )
    for target, processors in zip(TARGETS, (108, 132))
}
"""What the library asks PyTorch about an A100 and an H100."""


class KernelFault(AssertionError):
    """An executed kernel did what it must not do; the message lists the findings."""


@dataclass
class Launch:
    """One executed launch."""

    function: Any
    """The ``@jit`` function."""
    values: Mapping[str, Any]
    """Value of every argument, constexprs included."""
    types: Mapping[str, str]
    """Triton's type of every argument: ``*fp32``, ``i32``; ``constexpr`` for those that the compiler knows."""
    num_warps: int
    num_stages: int
    counts: Counts
    findings: list[str]
    """What is wrong, empty for a clean launch."""


@dataclass
class Execution:
    """What happens inside :func:`executing`."""

    target: int
    rewrite: Callable[[str, str], str] | None = None
    """Changes the PTX of a kernel (name, PTX) before it is executed."""
    launches: list[Launch] = field(default_factory=list)
    strict: bool = True
    """Whether a launch with findings raises :class:`KernelFault`."""
    _machines: dict[str, Machine] = field(default_factory=dict)
    _exposed: list[weakref.ref[Tensor]] = field(default_factory=list)
    _launching: bool = False

    def launch(self, compiled: Any, function: Any, values: Mapping[str, Any], grid: Any) -> None:
        """Executes a compiled kernel for all programs of ``grid``."""
        types = dict(compiled.src.signature)
        arguments = [values[name] for name in function.arg_names if types[name] != "constexpr"]
        if compiled.hash not in self._machines:
            ptx = compiled.asm["ptx"]
            program = parse(self.rewrite(compiled.name, ptx) if self.rewrite else ptx)
            self._machines[compiled.hash] = Machine(program, int(compiled.metadata.shared))
        machine = self._machines[compiled.hash]
        self._exposed = [ref for ref in self._exposed if ref() is not None]
        memory = GlobalMemory(arguments, [t for ref in self._exposed if (t := ref()) is not None])
        numbers = [v.data_ptr() if isinstance(v, Tensor) else v for v in arguments]
        counts, findings = machine.run(numbers, (*grid, 1, 1)[:3], memory)
        options = compiled.metadata
        record = Launch(function, values, types, options.num_warps, options.num_stages, counts, findings)
        self.launches.append(record)
        if findings and self.strict:
            raise KernelFault(f"{compiled.name} on sm_{self.target}: " + "\n  ".join(findings))

    def expose(self, tensor: Tensor) -> None:
        """Allows kernels to access ``tensor``, whose address they may get in a table, as long as it lives."""
        if not self._launching:
            self._exposed.append(weakref.ref(tensor))


def poison(tensor: Tensor) -> Tensor:
    """Fills new memory on the CPU with the pattern of memory that nothing has written; returns ``tensor``."""
    # Tensors of other classes stand for tensors that are traced.
    if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.element_size() > 1:
        storage = tensor.untyped_storage()
        fill_unwritten(storage.data_ptr(), storage.nbytes())
    return tensor


@contextlib.contextmanager
def executing(target: int, *, rewrite: Callable[[str, str], str] | None = None, strict: bool = True) -> Iterator[Any]:
    """Inside the block ``backend="triton"`` executes compiled kernels on CPU tensors; yields an :class:`Execution`.

    Args:
        target: compute capability, one of :data:`TARGETS`.
        rewrite: changes the PTX of a kernel (name, PTX) before it is executed.
        strict: raise :class:`KernelFault` after a launch with findings, instead of only recording them.

    Raises:
        ValueError: unknown target.
        RuntimeError: Triton is missing, or this process interprets kernels.
    """
    if target not in TARGETS:
        raise ValueError(f"target: got {target}, expected one of {', '.join(map(str, TARGETS))}")
    if not _triton.AVAILABLE or _triton.INTERPRETED:
        raise RuntimeError("executing compiled kernels needs Triton, and a process without TRITON_INTERPRET=1")
    execution = Execution(target, rewrite, strict=strict)
    driver = _triton.triton.runtime.driver
    before = driver._active  # the property would look for a GPU
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, driver, "_active", before)
        driver.set_active(_device(target))
        for owner, name, replacement in _replacements(execution):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield execution


def _device(target: int) -> SimpleNamespace:
    """What Triton asks a driver when it compiles a launch: the target, and a number for its cache of kernels."""
    from triton.backends.compiler import GPUTarget

    return SimpleNamespace(
        get_current_device=lambda: target,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", target, 32),
    )


def _replacements(execution: Execution) -> Iterator[tuple[Any, str, Any]]:
    """Attributes to exchange, as (owner, name, value): the launcher, allocations, and how addresses are taken."""
    jit_function = _triton.triton.runtime.jit.JITFunction
    compile_launch, data_ptr = jit_function.run, Tensor.data_ptr

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        execution._launching = True
        try:
            compiled = compile_launch(function, *args, grid=grid, warmup=True, **options)
            values = dict(zip(function.arg_names, args)) | options
            if not warmup:
                execution.launch(compiled, function, values, grid(values) if callable(grid) else grid)
        finally:
            execution._launching = False
        return compiled

    def exposing_data_ptr(tensor: Tensor) -> int:
        execution.expose(tensor)
        return data_ptr(tensor)

    def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    yield torch.cuda, "get_device_properties", lambda device: PROPERTIES[execution.target]
    yield _triton, "executed", True
    yield jit_function, "run", run
    yield Tensor, "data_ptr", exposing_data_ptr
    for owner, names in (
        (torch, ("empty", "empty_like", "empty_strided")),
        (Tensor, ("new_empty", "new_empty_strided")),
    ):
        for name in names:
            yield owner, name, poisoned(getattr(owner, name))
