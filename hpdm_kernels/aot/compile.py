"""Compiles kernels for GPUs that need not be present, and checks that they may be shipped.

Triton's interpreter, which tests the kernels without a GPU, accepts kernels that do not compile, spill registers or
need more shared memory than a GPU has. So each kernel is also compiled ahead of time in every shipped configuration
(``aot_specs()`` of the op families). It fails if it uses any stack or too much shared memory.

Instructions are counted in PTX, or in the machine code (SASS), which must first be disassembled and so takes longer.
The committed table counts in SASS; a kernel fails if its PTX and its SASS use different matrix units.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hpdm_kernels import _triton
from hpdm_kernels._triton import SHARED_MEMORY_LIMITS, KernelSpec
from hpdm_kernels.aot.digest import compile_options, digest
from hpdm_kernels.aot.machine_code import disassemble, read_operands, read_ptx, read_sass, resource_usage
from hpdm_kernels.aot.result import Result, config_text


def compile_kernel(spec: KernelSpec, target: str, *, op: str = "", sass: bool = False) -> Result:
    """Compiles one kernel for one target.

    Args:
        spec: the kernel and its configuration.
        target: a key of :data:`SHARED_MEMORY_LIMITS`.
        op: the op family, for the result.
        sass: count instructions in SASS instead of PTX.
    """
    begin = time.perf_counter()
    try:
        compiled = _compile(spec, target)
    except Exception as error:  # the compiler's errors have no common base class
        text = str(error).strip().splitlines()
        problem = f"{type(error).__name__}: {text[-1] if text else 'no message'}"
        return Result(spec.name, target, op, config_text(spec), problem=problem)
    seconds = time.perf_counter() - begin
    registers, stack = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    code, read_from = read_ptx(ptx), "PTX"
    shared = int(compiled.metadata.shared)
    problems = []
    if stack:
        problems.append(f"{stack} bytes of stack")
    if shared > SHARED_MEMORY_LIMITS[target]:
        problems.append(f"{shared} bytes of shared memory, at most {SHARED_MEMORY_LIMITS[target]}")
    if sass:
        try:
            code, read_from = read_sass(disassemble(compiled.asm["cubin"])), "SASS"
        except RuntimeError as error:
            print(f"{spec.name} on {target}: read from PTX, because {error}", file=sys.stderr)
        if code.matrix != read_ptx(ptx).matrix:
            problems.append(f"PTX names matrix unit {read_ptx(ptx).matrix}, SASS {code.matrix}")
    return Result(
        kernel=spec.name,
        target=target,
        op=op,
        config=config_text(spec),
        registers=registers,
        stack=stack,
        shared=shared,
        operands=read_operands(ptx),
        read_from=read_from,
        digest=digest(spec),
        seconds=round(seconds, 2),
        problem="; ".join(problems),
        **asdict(code),
    )


def _compile(spec: KernelSpec, target: str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(spec.signature)
    source = ASTSource(
        fn=spec.fn,
        signature=spec.signature,
        constexprs=spec.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return _triton.triton.compile(source, target=gpu, options=compile_options(spec))


_work: list[tuple[str, KernelSpec, str]] = []
"""Op family, kernel, target. Forked workers inherit this list, because kernels cannot be pickled."""


def _job(job: tuple[int, bool]) -> Result:
    index, sass = job
    op, spec, target = _work[index]
    return compile_kernel(spec, target, op=op, sass=sass)


def compile_all(work: Sequence[tuple[str, KernelSpec, str]], *, jobs: int, sass: bool) -> list[Result]:
    """Compiles each ``(op family, spec, target)``, ``jobs`` at a time."""
    _work[:] = work
    with multiprocessing.get_context("fork").Pool(max(1, jobs)) as pool:
        return pool.map(_job, [(index, sass) for index in range(len(_work))], chunksize=1)
