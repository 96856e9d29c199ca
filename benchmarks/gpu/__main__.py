"""Runs all checks and timings on this machine's CUDA device: ``make gpu`` or ``python -m benchmarks.gpu``.

Needs torch with CUDA, triton, numpy and einops, and pytest for the timings; uses matplotlib if it is installed. Nothing
is installed. The pieces of ``pieces.py`` run in order, each in a separate process, within nine minutes by default. If a
kernel makes the CUDA context unusable, only the test that launched it fails: a new process continues with the rest.

The results of a piece are written as soon as it ends, to ``benchmarks/results/<GPU>/parts/<sources>/``. Complete pieces
are not run again, so an interrupted run can be continued as long as the sources and the versions of torch and triton
stay the same. The parts, even if some are missing, are merged into ``benchmarks/results/<GPU>/<date>-<sources>.json``
and ``.md``.

Exit status: 0 all passed; 1 something failed, or nothing can run here; 3 nothing failed, but pieces are missing.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.pieces import Piece, all_pieces
from benchmarks.gpu.suite import ROOT, Suite
from hpdm.files import write_json, write_text

# More pieces at a time might need more than 80 GB of device memory.
MOST_JOBS = 16
NEEDED = ("torch", "triton", "numpy", "einops")


def obstacle() -> str | None:
    """The reason why nothing can run here, in one line, or ``None``."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"{sys.executable} has no {', '.join(missing)}"
    import torch

    if not torch.cuda.is_available():
        build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return f"no CUDA device (torch {torch.__version__}, built {build})"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET=1 is set, which runs kernels on the CPU; unset it"
    return None


def sources_id(root: Path = ROOT) -> str:
    """Eight hexadecimal digits that change with the sources and with the versions of torch and triton."""
    digest = hashlib.sha256()
    for folder in ("hpdm_kernels", "hpdm", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    for package in ("torch", "triton"):
        # The imported module's version: vendors' builds of Triton are installed under other package names.
        version = importlib.import_module(package).__version__ if importlib.util.find_spec(package) else "none"
        digest.update(version.encode())
    return digest.hexdigest()[:8]


def listing(pieces: Sequence[Piece], state: str | None, suite: Suite | None) -> str:
    """One line per piece: budget, whether it runs alone, its state (or ``state``, if given), what it shows."""
    width = max(len(piece.name) for piece in pieces)
    lines = []
    for piece in pieces:
        now = state or ("complete" if suite and suite.complete(piece) else "to do")
        when = "alone" if piece.alone else "beside others"
        lines.append(f"{piece.name:<{width}}  {piece.seconds:>4.0f} s  {when:<13}  {now:<10}  {piece.shows}")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="what this GPU can show")
    parser.add_argument("--list", action="store_true", help="print the pieces with their budgets")
    parser.add_argument("--dry-run", action="store_true", help="say what would run here, and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these pieces alone, complete or not")
    parser.add_argument("--fresh", action="store_true", help="run everything from its start")
    parser.add_argument("--merge", action="store_true", help="run nothing, merge the results so far")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--jobs", type=int, help="pieces side by side (default: one per core, at most 16)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    return parser.parse_args(arguments)


def _interrupt(number: int, _: Any) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the pieces, merges their results, and returns the exit status."""
    options = _options(arguments)
    pieces = all_pieces()
    unknown = set(options.only or ()) - {piece.name for piece in pieces}
    if unknown:
        print(f"error: --only: no piece {', '.join(sorted(unknown))}; --list prints the pieces", file=sys.stderr)
        return 1
    chosen = [piece for piece in pieces if not options.only or piece.name in options.only]
    why = obstacle()
    if why:
        print(listing(chosen, "needs CUDA", None))
        if options.list or options.dry_run:
            print(f"nothing can run here: {why}")
            return 0
        print(f"error: {why}", file=sys.stderr)
        return 1

    import torch

    from benchmarks import machine

    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    parts = options.results.resolve() / slug / "parts"
    jobs = options.jobs or min(MOST_JOBS, os.cpu_count() or 4)
    run_id = sources_id()
    if importlib.util.find_spec("pytest") is None:
        left_out = [piece.name for piece in chosen if piece.needs_pytest]
        chosen = [piece for piece in chosen if not piece.needs_pytest]
        if left_out:
            print(
                f"{sys.executable} has no pytest, which timings need; left out: {', '.join(left_out)}", file=sys.stderr
            )
    suite = Suite(chosen, parts / run_id, options.limit, jobs, again=options.fresh or bool(options.only))
    if options.list or options.dry_run:
        print(listing(chosen, None, suite))
        return 0
    if not options.merge:
        parts.mkdir(parents=True, exist_ok=True)
        (parts / ".gitignore").write_text("*\n", encoding="utf-8")
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            suite.run()
        except KeyboardInterrupt:
            print("interrupted: merging the results so far", file=sys.stderr)

    every_piece = Suite(pieces, suite.folder)
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    environment = machine.environment(torch.device("cuda"), {}) | {"command": command}
    return _merge(every_piece, environment, options.results.resolve() / slug, run_id)


def _merge(suite: Suite, environment: dict[str, Any], folder: Path, run_id: str) -> int:
    """Merges all parts of ``suite``, writes and prints the result, draws charts, and returns the exit status."""
    from benchmarks import report
    from benchmarks.gpu import summary

    now = datetime.datetime.now(datetime.UTC)
    result = summary.merge(suite, environment, now.isoformat(timespec="seconds"))
    target = folder / f"{now:%Y-%m-%d}-{run_id}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, result)
    text = summary.markdown(result)
    write_text(target.with_suffix(".md"), text)
    print(text)
    try:
        report.chart([result], target.with_suffix(".png"))
    except ImportError as error:
        print(f"no chart: {error}")
    print(f"results: {target} and .md")
    incomplete = [piece["name"] for piece in result["pieces"] if piece["state"] != "complete"]
    if incomplete:
        print(f"run the same command again for what is not complete: {', '.join(incomplete)}")
    return summary.verdict(result)


if __name__ == "__main__":
    sys.exit(main())
