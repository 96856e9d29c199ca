"""Everything that this machine's CUDA device can show, in nine minutes: ``make gpu`` or ``python -m benchmarks.gpu``.

Takes the packages of the interpreter as they are: needs torch with CUDA, triton, numpy and einops; pytest and
matplotlib are used if they are there. Runs the pieces of ``pieces.py`` in order, each in a process of its own, so that
a kernel which takes the CUDA context down does not stop the rest. What a piece reports is written as soon as it ends to
``benchmarks/results/<GPU>/parts/<sources>/``; pieces that are complete there are not run again, so a run that was cut
short goes on where it was, as long as the sources and the versions of torch and triton stay the same. The parts are
merged into ``benchmarks/results/<GPU>/<date>-<sources>.json`` and ``.md``, also where some are missing.

Exit status: 0 all well; 1 something failed, or nothing can run here; 3 nothing failed, but pieces are missing.
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
from benchmarks.gpu.suite import ROOT, Suite, write

# Beside each other the pieces may need 60 GB of the device's memory; more would not fit into 80.
MOST_JOBS = 16
NEEDED = ("torch", "triton", "numpy", "einops")


def obstacle() -> str | None:
    """Why nothing can run here, in one line, or ``None``."""
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
    """Eight digits that change with the library, the benchmarks, and the versions of torch and triton."""
    digest = hashlib.sha256()
    for folder in ("hpdm_kernels", "hpdm", "benchmarks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    for package in ("torch", "triton"):
        # Not what is installed under that name: vendors' builds of Triton have others.
        version = importlib.import_module(package).__version__ if importlib.util.find_spec(package) else "none"
        digest.update(version.encode())
    return digest.hexdigest()[:8]


def listing(pieces: Sequence[Piece], state: str | None, suite: Suite | None) -> str:
    """One line per piece: when it runs, its budget, what it shows, and ``state`` or whether it is complete."""
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
    parser.add_argument("--fresh", action="store_true", help="run complete pieces again")
    parser.add_argument("--merge", action="store_true", help="run nothing, merge the parts there are")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--jobs", type=int, help="pieces side by side (default: one per core, at most 16)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    return parser.parse_args(arguments)


def _interrupted(number: int, _: Any) -> None:
    raise KeyboardInterrupt(f"signal {number}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the pieces, merges what they reported, and returns the exit status."""
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

    from benchmarks import harness

    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    parts = options.results.resolve() / slug / "parts"
    jobs = options.jobs or min(MOST_JOBS, os.cpu_count() or 4)
    run_id = sources_id()
    suite = Suite(chosen, parts / run_id, options.limit, jobs, again=options.fresh or bool(options.only))
    if options.list or options.dry_run:
        print(listing(chosen, None, suite))
        return 0
    if not options.merge:
        parts.mkdir(parents=True, exist_ok=True)
        (parts / ".gitignore").write_text("*\n", encoding="utf-8")
        signal.signal(signal.SIGTERM, _interrupted)
        try:
            suite.run()
        except KeyboardInterrupt:
            print("interrupted: merging what there is", file=sys.stderr)

    whole = Suite(pieces, suite.folder)
    command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    environment = harness.environment(torch.device("cuda"), {}) | {"command": command}
    return _merge(whole, environment, options.results.resolve() / slug, run_id)


def _merge(suite: Suite, environment: dict[str, Any], folder: Path, run_id: str) -> int:
    from benchmarks import report
    from benchmarks.gpu import summary

    now = datetime.datetime.now(datetime.UTC)
    result = summary.merge(suite, environment, now.isoformat(timespec="seconds"))
    target = folder / f"{now:%Y-%m-%d}-{run_id}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, result)
    text = summary.markdown(result)
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    try:
        report.chart([result], target.with_suffix(".png"))
    except ImportError as error:
        print(f"no chart: {error}")
    print(f"results: {target} and .md")
    left = [piece["name"] for piece in result["pieces"] if piece["state"] != "complete"]
    if left:
        print(f"the same command goes on with what is not complete: {', '.join(left)}")
    return summary.verdict(result)


if __name__ == "__main__":
    sys.exit(main())
