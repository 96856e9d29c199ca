"""Compiles every kernel for GPUs that need not be present: ``python -m hpdm_kernels.aot [--save docs/kernels.md]``.

The interpreter, which runs the kernels where there is no GPU, accepts kernels that do not compile, spill registers to
memory or want more shared memory than there is. So each kernel is also compiled ahead of time in every shipped
configuration (``aot_specs()`` of the op modules), and fails here if it uses any stack or too much shared memory.

Which instructions came out is read from PTX, at no cost, or from the machine code (SASS), a quarter of a second per
kernel: the committed table is written from SASS, and only where both name the same matrix units.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hpdm_kernels
from hpdm_kernels import _triton
from hpdm_kernels._triton import KernelSpec
from hpdm_kernels.aot.machine_code import disassemble, read_operands, read_ptx, read_sass, resource_usage, tool_versions
from hpdm_kernels.aot.table import (
    SHARED_MEMORY_LIMITS,
    Result,
    Table,
    config_text,
    read,
    render,
    stale_rows,
    write_text,
)


def op_modules() -> list[str]:
    """Modules of this package that define ``aot_specs``, without those that only pass one on."""
    found = []
    for info in pkgutil.walk_packages(hpdm_kernels.__path__, "hpdm_kernels."):
        if info.name.startswith("hpdm_kernels.aot"):
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


def compile_kernel(spec: KernelSpec, target: str, *, op: str = "", sass: bool = False) -> Result:
    """Compiles one kernel for one target and looks at what came out, in SASS if asked to, else in PTX."""
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
        return Result(
            spec.name,
            target,
            op,
            config_text(spec),
            problem=f"{type(error).__name__}: {text[-1] if text else 'no message'}",
        )
    seconds = time.perf_counter() - begin
    registers, stack = resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    code, read_from = read_ptx(ptx), "PTX"
    shared = int(compiled.metadata.shared)
    problems = []
    if stack:
        problems.append(f"{stack} bytes of stack")
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory, at most {limit}")
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
        seconds=round(seconds, 2),
        problem="; ".join(problems),
        **asdict(code),
    )


def table(results: Sequence[Result]) -> str:
    """One line per kernel and target."""
    width = max((len(r.kernel) for r in results), default=6)
    lines = [f"{'kernel':<{width}}  target  regs  stack   shared  matrix unit   16-byte loads  copies   time  "]
    for r in results:
        numbers = "".join(f"{'-' if n is None else n:>{w}}" for n, w in ((r.registers, 5), (r.stack, 7), (r.shared, 9)))
        matrix = r.matrix if r.matrix == "-" else f"{r.matrix} {r.operands}"
        loads = f"{r.wide_loads} of {r.loads}"
        verdict = f"FAILED: {r.problem}" if r.problem else "ok"
        lines.append(
            f"{r.kernel:<{width}}  {r.target:<6}{numbers}  {matrix:<12}  {loads:>13}  {r.async_copies:>6}  "
            f"{r.seconds:>4.1f}s  {verdict}"
        )
    return "\n".join(lines)


_specs: list[tuple[str, KernelSpec]] = []
"""Op and kernel; forked workers inherit them, for kernels cannot be pickled."""


def _job(job: tuple[int, str, bool]) -> Result:
    index, target, sass = job
    op, spec = _specs[index]
    return compile_kernel(spec, target, op=op, sass=sass)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints the table, and returns 1 if a kernel must not be shipped."""
    parser = argparse.ArgumentParser(
        prog="python -m hpdm_kernels.aot", description="compiles every kernel without a GPU"
    )
    parser.add_argument("--target", nargs="+", choices=SHARED_MEMORY_LIMITS, default=list(SHARED_MEMORY_LIMITS))
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="only kernels whose name contains this")
    parser.add_argument("--module", nargs="+", metavar="NAME", help="modules with aot_specs(), instead of all ops")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at work at once (default 2)")
    parser.add_argument("--sass", action="store_true", help="count instructions in the machine code, not in PTX")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all results as Markdown, counted in SASS")
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE",
        help="only compare a saved table's rows with today's kernels, no compiling",
    )
    options = parser.parse_args(arguments)
    part = options.filter or options.module or set(options.target) != set(SHARED_MEMORY_LIMITS)
    if (options.save or options.check) and part:
        print("error: --save and --check are about all kernels: drop --filter, --module, --target", file=sys.stderr)
        return 2
    if not _triton.AVAILABLE:
        print(f"error: triton is not importable ({_triton.IMPORT_ERROR})", file=sys.stderr)
        return 2
    if _triton.INTERPRETED:
        print("error: TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it", file=sys.stderr)
        return 2
    modules = options.module or op_modules()
    specs = collect(modules)
    if options.check:
        stale = stale_rows(read(options.check.read_text(encoding="utf-8")), specs)
        print("\n".join(stale) or f"{options.check}: lists all {len(specs)} kernels as they are")
        return 1 if stale else 0
    ops = {spec.name: _op(module) for module in modules for spec in collect([module])}
    _specs[:] = [(ops[spec.name], spec) for spec in specs if options.filter in spec.name]
    if not _specs:
        print(f"error: no kernel's name contains {options.filter!r}", file=sys.stderr)
        return 2
    sass = options.sass or options.save is not None
    jobs = [(index, target, sass) for target in options.target for index in range(len(_specs))]
    with multiprocessing.get_context("fork").Pool(max(1, options.jobs)) as pool:
        results = pool.map(_job, jobs, chunksize=1)
    print(table(results))
    failed = sum(bool(r.problem) for r in results)
    print(f"{len(results)} compiled, {failed} failed, {sum(r.seconds for r in results):.0f} s of compiling")
    if options.json:
        out: list[dict[str, Any]] = [asdict(r) for r in results]
        write_text(options.json, json.dumps(out, indent=1) + "\n")
    if options.save and failed:
        print(f"error: {options.save} not written: it lists kernels that may be shipped", file=sys.stderr)
    elif options.save:
        command = f"python -m hpdm_kernels.aot --save {options.save}"
        write_text(options.save, render(Table(tool_versions(), results), command))
    return 1 if failed else 0


def _op(module: str) -> str:
    """The folder of ``hpdm_kernels.attention.triton_backend``, ``attention``."""
    return module.split(".")[-2] if "." in module else module
