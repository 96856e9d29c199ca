"""Executes every shipped kernel on the CPU: ``python -m hpdm_kernels.aot.execution``.

python -m hpdm_kernels.aot.execution                              every case on sm_80 and sm_90, fails if one is wrong
python -m hpdm_kernels.aot.execution --target sm_80 --filter cross_attention
python -m hpdm_kernels.aot.execution --save docs/executed.md      also writes the table of all configurations
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hpdm_kernels import _triton
from hpdm_kernels.aot.collect import collect_by_op, op_modules
from hpdm_kernels.aot.execution.cases import Case, all_cases
from hpdm_kernels.aot.execution.coverage import Executed, executed
from hpdm_kernels.aot.execution.launch import TARGETS, Launch, executing
from hpdm_kernels.aot.execution.limits import is_above, reason
from hpdm_kernels.aot.execution.report import render
from hpdm_kernels.aot.table import write_text

_TARGETS = tuple(f"sm_{target}" for target in TARGETS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hpdm_kernels.aot.execution", description="executes the compiled kernels without a GPU"
    )
    parser.add_argument("--target", nargs="+", choices=_TARGETS, default=list(_TARGETS))
    parser.add_argument(
        "--filter", nargs="+", default=[""], metavar="SUBSTR", help="only cases named like one of these"
    )
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only every N-th case, from the I-th on")
    parser.add_argument("--seed", type=int, default=None, help="of the inputs (default: another one in each run)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table of all configurations as Markdown")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a case or a configuration failed, 2 for bad arguments."""
    options = _parser().parse_args(arguments)
    index, _, count = options.part.partition("/")
    cases = [case for case in all_cases() if any(text in case.name for text in options.filter)]
    problem = ""
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        problem = f"--part: got {options.part!r}, expected I/N with I from 1 to N"
    elif not cases:
        problem = f"no case's name contains one of {options.filter}"
    elif options.save and (options.filter != [""] or options.part != "1/1" or options.target != list(_TARGETS)):
        problem = "--save is about all configurations: drop --filter, --part and --target"
    elif not _triton.AVAILABLE or _triton.INTERPRETED:
        problem = "compiled kernels are executed: triton must be installed, TRITON_INTERPRET=1 not be set"
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    everything = options.filter == [""] and options.part == "1/1"
    cases = cases[int(index) - 1 :: int(count)]
    seed = torch.seed() % 2**31 if options.seed is None else options.seed
    print(f"--seed {seed}")
    failed, faulty, results, absent = 0, 0, [], []
    by_op = collect_by_op(op_modules())
    for target in options.target:
        launches: list[Launch] = []
        for case in cases:
            failed += not _run(case, target, seed, launches)
        faulty += sum(bool(launch.findings) for launch in launches)
        for op, specs in by_op.items():
            here = [spec for spec in specs if not spec.targets or target in spec.targets]
            found = {spec.name: executed(op, spec, target, launches) for spec in here}
            results += [result for result in found.values() if result]
            absent += [f"{name} on {target}" for name, result in found.items() if result is None]
    unexplained = [r for r in results if is_above(r) and not reason(r)]
    for r in unexplained:
        print(f"{r.kernel} on {r.target}: {r.sectors} sectors, {r.wavefronts} wavefronts of the ideal, no reason known")
    print(_summary(results, absent if everything else [], failed))
    if options.json:
        out = {"executed": [asdict(r) for r in results], "missing": absent, "failed": failed, "faulty": faulty}
        write_text(options.json, json.dumps(out, indent=1) + "\n")
    wrong = failed + faulty + len(unexplained) + (len(absent) if everything else 0)
    if options.save and not wrong:
        write_text(options.save, render(results, f"python -m hpdm_kernels.aot.execution --save {options.save}"))
    return 1 if wrong else 0


def _run(case: Case, target: str, seed: int, launches: list[Launch]) -> bool:
    """Runs a case, adds its launches, and prints a line with what is wrong; whether its results are right."""
    begin, problem = time.perf_counter(), ""
    with executing(int(target.removeprefix("sm_")), strict=False) as execution:
        try:
            case.check(torch.Generator().manual_seed(seed))
        except Exception as error:  # whatever a valid call raises is a fault
            problem = f"{type(error).__name__}: {error}"
    launches += execution.launches
    findings = [text for launch in execution.launches for text in launch.findings]
    problems = "\n    ".join([problem, *findings] if problem else findings)
    seconds = time.perf_counter() - begin
    print(
        f"{target} {case.name:<48} {len(execution.launches):3} launches {seconds:6.1f} s  {problems or 'ok'}",
        flush=True,
    )
    return not problem


def _summary(results: Sequence[Executed], absent: Sequence[str], failed: int) -> str:
    lines = [f"never executed: {name}" for name in absent]
    lines.append(
        f"{len(results)} configurations executed, {sum(bool(r.findings) for r in results)} with findings, "
        f"{len(absent)} missing; {failed} cases failed"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
