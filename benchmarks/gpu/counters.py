"""Holds the executor's counts against the hardware's counters: the same small calls, executed and profiled.

``python -m benchmarks.gpu.counters run`` makes the calls of ``hpdm_kernels/aot/execution/cases.py`` on this machine's
GPU and checks their results; other tools can watch it, such as ``compute-sanitizer --tool racecheck``.
``... profile FILE`` does so under Nsight Compute and writes its counters to a CSV file.
``... compare FILE`` executes the calls on the CPU, with the installed version of Triton, and prints both counts.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hpdm_kernels.aot.execution.cases import Case, all_cases
from hpdm_kernels.aot.execution.counts import Counts
from hpdm_kernels.aot.execution.launch import executing

KERNELS = "cross_attention|context|coordinate_sums|sample_patches|_tiles_kernel"
"""Our kernels among PyTorch's, for Nsight Compute."""
SECTORS, WAVEFRONTS = "l1tex__t_sectors_pipe_lsu_mem_global_op_", "l1tex__data_pipe_lsu_wavefronts_mem_shared_op_"
COUNTERS = {
    "sectors loaded": f"{SECTORS}ld.sum",
    "sectors stored": f"{SECTORS}st.sum",
    "wavefronts loaded": f"{WAVEFRONTS}ld.sum",
    "wavefronts stored": f"{WAVEFRONTS}st.sum",
}
"""What is compared -> counter. Asynchronous copies count as loads of global memory, not as stores to shared memory."""


def chosen(words: Sequence[str]) -> list[Case]:
    """The cases with one of ``words`` in their names."""
    return [case for case in all_cases() if any(word in case.name for word in words)]


def run(cases: Iterable[Case]) -> int:
    """Makes the calls on the GPU, prints a line for each, and returns how many gave a wrong result."""
    wrong = 0
    for case in cases:
        begin, problem = time.perf_counter(), "ok"
        try:
            with torch.device("cuda"):
                case.check(torch.Generator("cuda").manual_seed(0))
            torch.cuda.synchronize()
        except Exception as error:  # whatever a valid call raises is a fault
            wrong, problem = wrong + 1, f"{type(error).__name__}: {error}"
        print(f"{case.name:<48} {time.perf_counter() - begin:6.1f} s  {problem}", flush=True)
    return wrong


def profile(file: Path, words: Sequence[str]) -> int:
    """Runs this program under Nsight Compute; returns its exit status."""
    this = [sys.executable, "-m", "benchmarks.gpu.counters", "run", "--filter", *words]
    options = ["--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", f"regex:{KERNELS}"]
    command = ["ncu", *options, "--metrics", ",".join(COUNTERS.values()), "--log-file", str(file), *this]
    return subprocess.run(command, check=False).returncode


def profiled(file: Path) -> list[tuple[str, dict[str, int]]]:
    """Kernel and counters of each launch of a file of :func:`profile`, in their order.

    Raises:
        ValueError: the file has no launches, or lacks a column.
    """
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))[1:]  # the first row has the units
    if not rows:
        raise ValueError(f"{file}: got no launches, expected a CSV file of Nsight Compute")
    missing = {"Kernel Name", *COUNTERS.values()} - rows[0].keys()
    if missing:
        raise ValueError(f"{file}: got no column {', '.join(sorted(missing))}")
    number = lambda text: int(float(text.replace(",", "")))
    return [(row["Kernel Name"], {name: number(row[c]) for name, c in COUNTERS.items()}) for row in rows]


def counted(counts: Counts) -> dict[str, int]:
    """What :data:`COUNTERS` count, as executed."""
    result = dict.fromkeys(COUNTERS, 0)
    for traffic, what in ((counts.sectors, "sectors"), (counts.wavefronts, "wavefronts")):
        for index, part in traffic.items():
            kind = counts.texts[index].split()[0].split(".")[0]
            if kind in ("ld", "ldmatrix") or (kind == "cp" and what == "sectors"):
                result[f"{what} loaded"] += part.moved
            elif kind in ("st", "stmatrix"):
                result[f"{what} stored"] += part.moved
    return result


def compare(file: Path, cases: Iterable[Case], target: int) -> int:
    """Executes the cases, prints both counts for each kernel, and returns the number of different launches.

    Random boxes differ between the CPU and a GPU, and with them the counts of what reads footprints or patches. Counts
    of loads from shared memory differ where the assembler keeps values in registers.
    """
    measured = profiled(file)
    executed: list[tuple[str, dict[str, int]]] = []
    with executing(target, strict=False) as execution:
        for case in cases:
            case.check(torch.Generator().manual_seed(0))
            named = [(launch.function.__name__, launch.counts) for launch in execution.launches]
            executed += [(name, counted(counts)) for name, counts in named if re.search(KERNELS, name)]
            execution.launches.clear()
    if [name for name, _ in measured] != [name for name, _ in executed]:
        raise ValueError(f"{file}: got {len(measured)} launches, expected these {len(executed)} in the same order")
    sums: dict[str, dict[str, list[int]]] = defaultdict(lambda: {name: [0, 0] for name in COUNTERS})
    different, launches = dict.fromkeys(COUNTERS, 0), defaultdict(int)
    for (name, ours), (_, theirs) in zip(executed, measured, strict=True):
        launches[name] += 1
        for what in COUNTERS:
            sums[name][what][0] += ours[what]
            sums[name][what][1] += theirs[what]
            different[what] += ours[what] != theirs[what]
    print("| kernel | launches | " + " | ".join(f"{what}, executed / hardware" for what in COUNTERS) + " |")
    print("|---|--:|" + "--:|" * len(COUNTERS))
    for name, values in sums.items():
        cells = " | ".join(f"{a:,} / {b:,}" for a, b in values.values())
        print(f"| `{name}` | {launches[name]} | {cells} |")
    print(f"launches of {len(executed)} that differ: " + ", ".join(f"{what} {n}" for what, n in different.items()))
    return max(different.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if something was wrong or differs, 2 for a file that cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.counters")
    parser.add_argument("do", choices=("run", "profile", "compare"))
    parser.add_argument("file", type=Path, nargs="?", help="CSV file of profile and compare")
    parser.add_argument("--filter", nargs="+", default=[""], metavar="WORD", help="only cases with one of these names")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="only every N-th case, from the I-th on; not of profile"
    )
    options = parser.parse_args(arguments)
    if options.do != "run" and options.file is None:
        parser.error(f"{options.do}: expected a CSV file")
    first, _, step = options.part.partition("/")
    cases = chosen(options.filter)[int(first) - 1 :: int(step)]
    if not cases:
        parser.error(f"no case's name contains one of {options.filter}")
    if options.do == "run":
        return int(run(cases) > 0)
    if options.do == "profile":
        return profile(options.file, options.filter)
    try:
        return int(compare(options.file, cases, 90) > 0)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
