"""Compiles every kernel for GPUs that need not be present: ``python -m hpdm_kernels.aot``.

The interpreter, which runs the kernels where there is no GPU, accepts kernels that do not compile, spill registers to
memory or want more shared memory than there is. So each kernel is also compiled ahead of time in every shipped
configuration (``aot_specs()`` of the op modules), and fails here if it uses any stack or too much shared memory.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hpdm_kernels
from hpdm_kernels import _triton
from hpdm_kernels._triton import KernelSpec

SHARED_MEMORY_LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
"""Bytes of shared memory that one block may use; Triton does not check it when compiling ahead of time."""

# PTX to what the hardware calls it: which matrix units a kernel uses.
_MATRIX_INSTRUCTIONS = {"tcgen05.mma": "UTCMMA", "wgmma.mma_async": "HGMMA", "mma.sync": "HMMA"}
_GLOBAL_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d+))?\.[busf](\d+)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\b")


@dataclass(frozen=True)
class Result:
    """One kernel compiled for one target."""

    kernel: str
    target: str
    registers: int | None = None
    stack: int | None = None
    """Bytes per thread; more than none means that registers were spilled."""
    shared: int | None = None
    """Bytes per block."""
    matrix: str = "-"
    """``HGMMA`` (Hopper), ``HMMA`` (Ampere), ``UTCMMA`` (Blackwell) or ``-``."""
    loads: int = 0
    """Loads from global memory in the code, asynchronous copies included."""
    wide_loads: int = 0
    """Those of 16 bytes or more per thread."""
    seconds: float = 0.0
    problem: str = ""
    """Why this kernel must not be shipped, empty if it may."""


def op_modules() -> list[str]:
    """Modules of this package that define ``aot_specs``, without those that only pass one on."""
    found = []
    for info in pkgutil.iter_modules(hpdm_kernels.__path__, "hpdm_kernels."):
        if info.name == __name__:
            continue
        specs = getattr(importlib.import_module(info.name), "aot_specs", None)
        if specs is not None and specs.__module__ == info.name:
            found.append(info.name)
    return found


def collect(modules: Iterable[str]) -> list[KernelSpec]:
    """The specs of the modules.

    Raises:
        ValueError: two specs of the same name, or a spec that does not cover its kernel's arguments.
    """
    specs: dict[str, KernelSpec] = {}
    for module in modules:
        for spec in importlib.import_module(module).aot_specs():
            if spec.name in specs:
                raise ValueError(f"{module}.aot_specs(): two specs are named {spec.name!r}, expected unique names")
            if list(spec.signature) != list(spec.fn.arg_names):
                raise ValueError(
                    f"{module}.aot_specs(): {spec.name!r} has arguments {list(spec.signature)}, "
                    f"expected {list(spec.fn.arg_names)}"
                )
            specs[spec.name] = spec
    return list(specs.values())


def compile_kernel(spec: KernelSpec, target: str) -> Result:
    """Compiles one kernel for one target and looks at what came out."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    limit = SHARED_MEMORY_LIMITS[target]
    names = list(spec.signature)
    source = ASTSource(
        fn=spec.fn,
        signature=spec.signature,
        constexprs=spec.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    begin = time.perf_counter()
    try:
        compiled = _triton.triton.compile(
            source,
            target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32),
            # Fused multiply-add is the default at run time; here it is asked for, since unset it warns.
            options={"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True},
        )
    except Exception as error:  # the compiler's errors have no common base; all of them are results here
        text = str(error).strip().splitlines()
        return Result(spec.name, target, problem=f"{type(error).__name__}: {text[-1] if text else 'no message'}")
    seconds = time.perf_counter() - begin
    registers, stack = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    wide, loads = count_loads(ptx)
    shared = int(compiled.metadata.shared)
    problems = []
    if stack:
        problems.append(f"{stack} bytes of stack")
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory, at most {limit}")
    return Result(
        kernel=spec.name,
        target=target,
        registers=registers,
        stack=stack,
        shared=shared,
        matrix=next((name for text, name in _MATRIX_INSTRUCTIONS.items() if text in ptx), "-"),
        loads=loads,
        wide_loads=wide,
        seconds=round(seconds, 2),
        problem="; ".join(problems),
    )


def count_loads(ptx: str) -> tuple[int, int]:
    """Loads from global memory in PTX: (those of at least 16 bytes per thread, all)."""
    sizes = [int(vector or 1) * int(bits) // 8 for vector, bits in _GLOBAL_LOAD.findall(ptx)]
    sizes += [int(size, 0) for size in _ASYNC_COPY.findall(ptx)]
    return sum(size >= 16 for size in sizes), len(sizes)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, from the ``cubin`` by Triton's own ``cuobjdump``."""
    tool = Path(_triton.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", out)
    if not usage:
        raise RuntimeError(f"cuobjdump -res-usage: got {out!r}, expected REG and STACK")
    return max(int(r) for r, _ in usage), max(int(s) for _, s in usage)


def table(results: Sequence[Result]) -> str:
    """One line per kernel and target."""
    width = max((len(r.kernel) for r in results), default=6)
    lines = [f"{'kernel':<{width}}  target  regs  stack   shared  matrix  16-byte loads   time  "]
    for r in results:
        numbers = "".join(f"{'-' if n is None else n:>{w}}" for n, w in ((r.registers, 5), (r.stack, 7), (r.shared, 9)))
        loads = f"{r.wide_loads} of {r.loads}"
        verdict = f"FAILED: {r.problem}" if r.problem else "ok"
        lines.append(
            f"{r.kernel:<{width}}  {r.target:<6}{numbers}  {r.matrix:<6}  {loads:>13}  {r.seconds:>4.1f}s  {verdict}"
        )
    return "\n".join(lines)


_specs: list[KernelSpec] = []


def _job(job: tuple[int, str]) -> Result:
    index, target = job
    return compile_kernel(_specs[index], target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints the table, and returns 1 if a kernel must not be shipped."""
    parser = argparse.ArgumentParser(
        prog="python -m hpdm_kernels.aot", description="compiles every kernel without a GPU"
    )
    parser.add_argument("--target", nargs="+", choices=SHARED_MEMORY_LIMITS, default=list(SHARED_MEMORY_LIMITS))
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="only kernels whose name contains this")
    parser.add_argument("--module", nargs="+", metavar="NAME", help="modules with aot_specs(), instead of all ops")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at work at once (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    options = parser.parse_args(arguments)
    if not _triton.AVAILABLE:
        print(f"error: triton is not importable ({_triton.IMPORT_ERROR})", file=sys.stderr)
        return 2
    if _triton.INTERPRETED:
        print("error: TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    _specs[:] = [s for s in collect(options.module or op_modules()) if options.filter in s.name]
    if not _specs:
        print(f"error: no kernel's name contains {options.filter!r}", file=sys.stderr)
        return 2
    jobs = [(index, target) for target in options.target for index in range(len(_specs))]
    # Forked workers inherit the specs, whose kernels cannot be pickled.
    with multiprocessing.get_context("fork").Pool(max(1, options.jobs)) as pool:
        results = pool.map(_job, jobs, chunksize=1)
    print(table(results))
    failed = sum(bool(r.problem) for r in results)
    print(f"{len(results)} compiled, {failed} failed, {sum(r.seconds for r in results):.0f} s of compiling")
    if options.json:
        out: list[dict[str, Any]] = [asdict(r) for r in results]
        options.json.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
