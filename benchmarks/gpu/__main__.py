"""Checks every kernel on this machine's CUDA device, then times them: ``python -m benchmarks.gpu``.

Takes the packages of the interpreter as they are; needs torch with CUDA, triton, numpy, einops and pytest. Each file of
tests runs in a process of its own, so that a kernel which takes the CUDA context down does not stop the rest. The files
of correctness tests run side by side, the benchmarks one after another. Results: JSON, Markdown and (with matplotlib) a
chart in ``benchmarks/results/<GPU>/``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NEEDED = ("torch", "triton", "numpy", "einops", "pytest")


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


def _start(file: Path, results: Path, options: Sequence[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", str(file.relative_to(ROOT)), "--results", str(results), "-p", "no:xdist"]
    return subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str], file: Path, results: Path, until: float) -> dict[str, Any]:
    """Waits, prints the end of the output, and gives what the file reported, or that it reported nothing."""
    try:
        out, _ = process.communicate(timeout=max(1.0, until - time.monotonic()))
        how = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        how = "stopped: out of time"
    name = str(file.relative_to(ROOT))
    print(f"---- {name}: {how}\n{out[-6000:]}", flush=True)
    if results.exists():
        result: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    else:
        result = {"rows": [], "tests": [{"id": name, "outcome": "crashed", "message": f"{how}; {out[-500:]}"}]}
    return result


def summary(result: dict[str, Any]) -> str:
    """The correctness results in Markdown; the benchmarks' tables follow them."""
    tests = [t for t in result["tests"] if t["outcome"] != "passed" or "error_of_budget" in t]
    passed = sum(t["outcome"] == "passed" for t in result["tests"])
    skipped = sum(t["outcome"] == "skipped" for t in result["tests"])
    lines = ["## Correctness", "", f"{passed} of {len(result['tests'])} passed, {skipped} skipped.", ""]
    lines += ["| test | outcome | largest error / budget | message |", "|---|---|---:|---|"]
    for t in sorted(tests, key=lambda t: t["outcome"] == "passed"):
        worst = t.get("error_of_budget")
        message = re.sub(r"[|\s]+", " ", t["message"])[:160]
        lines.append(f"| {t['id']} | {t['outcome']} | {'-' if worst is None else f'{worst:.2f}'} | {message} |")
    return "\n".join(lines)


def main() -> int:
    """Runs everything, writes the results, and returns 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="correctness and speed on this GPU")
    parser.add_argument("--seconds", type=float, default=0.5, help="timing per comparison (default 0.5)")
    parser.add_argument("--limit", type=float, default=290, help="seconds for everything (default 290)")
    parser.add_argument("--only", choices=("correctness", "speed"), help="only one of the two halves")
    options = parser.parse_args()
    why = obstacle()
    if why:
        print(f"error: {why}", file=sys.stderr)
        return 1
    import torch

    from benchmarks import harness, report

    until = time.monotonic() + options.limit
    checks = sorted(Path(__file__).parent.glob("test_*.py")) if options.only != "speed" else []
    speeds = sorted(Path(__file__).parents[1].glob("test_*.py")) if options.only != "correctness" else []
    parts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {file: Path(folder) / f"{file.stem}-{n}.json" for n, file in enumerate([*checks, *speeds])}
        running = {file: _start(file, files[file], []) for file in checks}
        parts += [_finish(process, file, files[file], until) for file, process in running.items()]
        for file in speeds:
            if time.monotonic() > until:
                name = str(file.relative_to(ROOT))
                parts.append({"rows": [], "tests": [{"id": name, "outcome": "skipped", "message": "out of time"}]})
                continue
            process = _start(file, files[file], ["--seconds", str(options.seconds)])
            parts.append(_finish(process, file, files[file], until))
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "date": now.isoformat(timespec="seconds"),
        **harness.environment(torch.device("cuda")),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "tests": [test for part in parts for test in part["tests"]],
        "rows": [row for part in parts for row in part["rows"]],
    }
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    target = Path(__file__).parents[1] / "results" / slug / f"{now:%Y-%m-%d-%H%M%S}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = f"# {torch.cuda.get_device_name()}\n\n{report.markdown(result)}\n\n{summary(result)}\n"
    target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    try:
        report.chart([result], target.with_suffix(".png"))
    except ImportError as error:
        print(f"no chart: {error}")
    failed = [t["id"] for t in result["tests"] if t["outcome"] not in ("passed", "skipped")]
    print(f"results: {target.relative_to(ROOT)} and .md; {len(result['tests'])} tests, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
