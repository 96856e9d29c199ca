"""Compiles every kernel for GPUs that need not be present: ``python -m hpdm_kernels.aot``.

python -m hpdm_kernels.aot                          compile all kernels, print a table, fail if any kernel fails
python -m hpdm_kernels.aot --target sm_86           the same for one GPU
python -m hpdm_kernels.aot --check docs/kernels.md  compile nothing; fail if the saved table does not match the code
python -m hpdm_kernels.aot --renew docs/kernels.md  compile only the kernels whose rows are missing or stale, and save
python -m hpdm_kernels.aot --save docs/kernels.md   compile all kernels and save the table
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpdm_kernels import _triton
from hpdm_kernels._triton import SHARED_MEMORY_LIMITS, KernelSpec
from hpdm_kernels.aot.collect import collect_by_op, op_modules, sample
from hpdm_kernels.aot.compile import compile_all
from hpdm_kernels.aot.machine_code import tool_versions
from hpdm_kernels.aot.result import TARGETS, Result, compilations, is_own
from hpdm_kernels.aot.table import Table, current_rows, read, render, stale_rows, write_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hpdm_kernels.aot", description="compiles every kernel without a GPU"
    )
    parser.add_argument(
        "--target", nargs="+", choices=SHARED_MEMORY_LIMITS, default=[],
        help=f"default: {' '.join(TARGETS)}, and what the other targets have in configurations of their own",
    )  # fmt: skip
    parser.add_argument("--own", action="store_true", help="only configurations that sm_80 does not have")
    parser.add_argument("--filter", default="", metavar="SUBSTR", help="only kernels whose name contains this")
    parser.add_argument("--module", nargs="+", metavar="NAME", help="modules with aot_specs(), instead of all ops")
    parser.add_argument("--sample", type=int, metavar="N", help="only one configuration in N of each kernel, at random")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="number of compilers at a time (default 2)")
    parser.add_argument("--sass", action="store_true", help="count instructions in the machine code, not in PTX")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write all results as Markdown, counted in SASS")
    parser.add_argument(
        "--renew", type=Path, metavar="FILE", help="as --save, but keep the rows of FILE that are of today's code"
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="only compare a saved table with today's kernels, no compiling"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a kernel must not be shipped or a table is stale, 2 for bad arguments."""
    options = _parser().parse_args(arguments)
    obstacle = _obstacle(options)
    if obstacle:
        print(f"error: {obstacle}", file=sys.stderr)
        return 2
    by_op = collect_by_op(options.module or op_modules())
    if options.check:
        return _check(options.check, [spec for specs in by_op.values() for spec in specs])
    by_op = {op: [spec for spec in specs if options.filter in spec.name] for op, specs in by_op.items()}
    if not any(by_op.values()):
        print(f"error: no kernel's name contains {options.filter!r}", file=sys.stderr)
        return 2
    if options.sample:
        by_op = {op: sample(specs, options.sample, options.seed) for op, specs in by_op.items()}
    reused: list[Result] = []
    if options.renew:
        old = read(options.renew.read_text(encoding="utf-8"))
        reused = current_rows(old, by_op) if old.tools == tool_versions() else []
    known = {(result.kernel, result.target) for result in reused}
    work = [
        (op, spec, target)
        for op, spec, target in compilations(by_op, options.target)
        if (spec.name, target) not in known and (is_own(spec, target) or not options.own)
    ]
    saved = options.save or options.renew
    results = compile_all(work, jobs=options.jobs, sass=bool(options.sass or saved))
    print(_text(results))
    failed = sum(bool(r.problem) for r in results)
    print(f"{len(results)} compiled, {failed} failed, {sum(r.seconds for r in results):.0f} s of compiling")
    if options.json:
        out: list[dict[str, Any]] = [asdict(r) for r in results]
        write_text(options.json, json.dumps(out, indent=1) + "\n")
    if saved and failed:
        print(f"error: {saved} not written: it lists kernels that may be shipped", file=sys.stderr)
    elif saved:
        page = saved.with_name("executed.md")
        executed = page.read_text(encoding="utf-8") if page.exists() else ""
        table = Table(tool_versions(), _in_order(by_op, [*reused, *results]))
        write_text(saved, render(table, _command(saved), executed))
    return 1 if failed else 0


def _obstacle(options: argparse.Namespace) -> str:
    """The reason why the command cannot run, empty if it can."""
    part = options.filter or options.module or options.sample or options.target or options.own
    if part and (options.save or options.check or options.renew):
        return "--save, --renew and --check are about all kernels: drop --filter, --module, --target, --own, --sample"
    if sum(map(bool, (options.save, options.check, options.renew))) > 1:
        return "--save, --renew and --check: got several, expected at most one of them"
    if options.sample is not None and options.sample < 1:
        return f"--sample: got {options.sample}, expected at least 1"
    if not _triton.AVAILABLE:
        return f"triton is not importable ({_triton.IMPORT_ERROR})"
    if _triton.INTERPRETED:
        return "TRITON_INTERPRET=1 is set: interpreted kernels cannot be compiled; unset it"
    return ""


def _check(file: Path, specs: Sequence[KernelSpec]) -> int:
    stale = stale_rows(read(file.read_text(encoding="utf-8")), specs)
    print("\n".join(stale) or f"{file}: lists all {len(specs)} kernels as they are")
    return 1 if stale else 0


def _command(file: Path) -> str:
    return f"python -m hpdm_kernels.aot --save {file}"


def _in_order(by_op: dict[str, list[KernelSpec]], results: Sequence[Result]) -> list[Result]:
    """The results in the order of the specs, so that a table does not depend on which of its rows were reused."""
    names = dict.fromkeys(spec.name for specs in by_op.values() for spec in specs)
    positions, targets = {name: i for i, name in enumerate(names)}, list(SHARED_MEMORY_LIMITS)
    return sorted(results, key=lambda r: (positions[r.kernel], targets.index(r.target)))


def _text(results: Sequence[Result]) -> str:
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


if __name__ == "__main__":
    sys.exit(main())
