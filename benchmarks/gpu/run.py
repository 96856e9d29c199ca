"""Runs the cases of one file without pytest: ``python -m benchmarks.gpu.run FILE [-k WORD] [--results FILE]``.

The results are written after every case. Cases that already have a result in the file are not run again. Exit status:
0 all passed; 1 some failed; 3 the CUDA context was lost, and a new process can continue.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gpu.cases import FILES, cases_of, run
from benchmarks.gpu.progress import CONTEXT_LOST, Progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the remaining cases and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run")
    parser.add_argument("file", choices=FILES)
    parser.add_argument("-k", default="", metavar="WORD", help="only cases with this in their names")
    parser.add_argument("--results", type=Path, help="JSON file for the results")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress = Progress(options.results)
    for name, case in cases_of(options.file):
        if options.k not in case.name or name in progress.names():
            continue
        progress.begin(name)
        start = time.perf_counter()
        result = run(case, device)
        progress.end({"id": name, **result})
        print(f"{result['outcome']} {time.perf_counter() - start:.1f} s {name} {result['message']}", flush=True)
        if harness.context_lost(device):
            return CONTEXT_LOST
    progress.finish()
    return int(any(test["outcome"] == "failed" for test in progress.tests))


if __name__ == "__main__":
    sys.exit(main())
