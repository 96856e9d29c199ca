"""Tries the ops on random arguments: ``python -m hpdm_kernels.testing fuzz``.

python -m hpdm_kernels.testing fuzz                               every op for a minute in all
python -m hpdm_kernels.testing fuzz --op read_tokens --seconds 600
python -m hpdm_kernels.testing fuzz --op read_tokens --seed 17 --configurations 1      one again

With TRITON_INTERPRET=1 also ``--backend triton``. Exit status 1 if an op failed, 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hpdm_kernels import _triton
from hpdm_kernels.testing.fuzz import OPS, Failure, fuzz


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hpdm_kernels.testing", description="tests of the ops")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fuzz", help="random configurations against formulas in fp64")
    command.add_argument("--op", nargs="+", choices=OPS, default=list(OPS), help="ops to try (default: all)")
    command.add_argument("--backend", choices=("reference", "torch", "triton"), default="torch")
    command.add_argument("--seed", type=int, default=0, help="of the first configuration (default 0)")
    command.add_argument("--configurations", type=int, metavar="N", help="configurations per op")
    command.add_argument("--seconds", type=float, metavar="S", help="time per op (default: a minute for all together)")
    return parser


def _tell(failure: Failure) -> None:
    print(f"{failure.op} {failure.problem}\n    {failure.replay()}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, 1 if a configuration failed, 2 for bad arguments."""
    options = _parser().parse_args(arguments)
    for name in ("configurations", "seconds"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            print(f"error: --{name}: got {getattr(options, name)}, expected more than 0", file=sys.stderr)
            return 2
    if options.backend == "triton" and not _triton.INTERPRETED:
        print("error: --backend triton: set TRITON_INTERPRET=1, the tensors are on the CPU", file=sys.stderr)
        return 2
    seconds = options.seconds
    if seconds is None and options.configurations is None:
        seconds = 60 / len(options.op)
    failed = 0
    for op in options.op:
        report = fuzz(
            op, options.backend, seed=options.seed, configurations=options.configurations, seconds=seconds,
            on_failure=_tell,
        )  # fmt: skip
        failed += len(report.failures)
        print(
            f"{op:<16} {options.backend}: {report.valid} valid and {report.spoiled} wrong configurations, "
            f"{len(report.failures)} failed",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
