"""``python -m benchmarks.report``: tables, charts, comparisons and a page of results from the JSON files of
``pytest benchmarks``.

::

    python -m benchmarks.report FILE.json ...                       prints Markdown tables, draws charts beside each
    python -m benchmarks.report OLD.json NEW.json                   also lists differences in time and memory
    python -m benchmarks.report --readme PAGE.md FILE.json ...      writes the results between two markers of a page
    python -m benchmarks.report --readme PAGE.md --check            checks the page against the files that it names

Exit status 1: something got slower or needs more memory, or the README differs; 2: a file or argument is unusable.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import charts
from benchmarks.tables import Result, Row, duration, header, markdown, memory, summary, text, tokens, where
from hpdm.files import atomic_path

__all__ = ["block", "chart", "compare", "main", "markdown", "read", "splice", "summary", "text"]

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
LEGEND = (
    'Medians. "Reference" is the paper\'s formula in plain PyTorch, "strongest peer" the fastest of the others in the '
    'same run that take products no less exactly, "ours" our fastest variant. `p` is the exponent of the fit ~ '
    "tokens^p to all points, and between the last two."
)
TIME_MARGIN, MEMORY_MARGIN = 1.1, 1.05


def read(path: Path) -> dict[str, Any]:
    """Reads a result file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: not a file that ``pytest benchmarks`` wrote.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    needed = ("machine", "versions", "float32_matmul_precision", "commit", "command", "date", "rows")
    missing = [name for name in needed if not isinstance(result, dict) or name not in result]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}; expected a file that `pytest benchmarks` wrote")
    return dict(result)


def chart(results: Sequence[Result], path: Path) -> Path:
    """Draws the charts of the first result beside ``path`` and returns the path of the first chart.

    Raises:
        ImportError: matplotlib is not installed.
    """
    return next(iter(charts.draw(results[0], path)), path)


# --- comparison of two files ---


def compare(old: Result, new: Result) -> dict[str, list[str]]:
    """Differences between two runs, as lines by heading.

    Times differ if they change by more than 10 % and by more than the sum of both interquartile ranges; memory differs
    if it changes by more than 5 %.
    """
    before, after = _by_key(old), _by_key(new)
    both = sorted(before.keys() & after.keys())
    out: dict[str, list[str]] = {
        "slower": [],
        "more memory": [],
        "faster": [],
        "less memory": [],
        "not measured now": [],
    }
    for key in both:
        was, now = before[key], after[key]
        if was["median_s"] and now["median_s"]:
            noise = (was["iqr_s"] or 0) + (now["iqr_s"] or 0)
            certain = abs(now["median_s"] - was["median_s"]) > noise
            line = _change(key, was, now, "median_s", duration)
            if certain and now["median_s"] > TIME_MARGIN * was["median_s"]:
                out["slower"].append(line)
            if certain and was["median_s"] > TIME_MARGIN * now["median_s"]:
                out["faster"].append(line)
        if was.get("peak_extra_bytes") is not None and now.get("peak_extra_bytes") is not None:
            line = _change(key, was, now, "peak_extra_bytes", memory)
            if now["peak_extra_bytes"] > MEMORY_MARGIN * was["peak_extra_bytes"]:
                out["more memory"].append(line)
            if was["peak_extra_bytes"] > MEMORY_MARGIN * now["peak_extra_bytes"]:
                out["less memory"].append(line)
    for key in sorted(before):
        if not before[key]["error"] and (key not in after or after[key]["error"]):
            why = after[key]["error"] if key in after else "no such row"
            out["not measured now"].append(f"{' | '.join(key)}: {why[:90]}")
    return out


def _by_key(result: Result) -> dict[tuple[str, ...], Row]:
    keys = ("group", "shape", "direction", "contender")
    rows = {}
    for row in result["rows"]:
        size = tokens(row)
        rows[(*(row[k] for k in keys), *([f"{size} tokens"] if size else []))] = row
    return rows


def _change(key: Sequence[str], was: Row, now: Row, field: str, unit: Callable[[float | None], str]) -> str:
    ratio = f" ({now[field] / was[field]:.2f}x)" if was[field] else ""
    return f"{' | '.join(key)}: {unit(was[field])} -> {unit(now[field])}{ratio}"


def _different_setting(old: Result, new: Result) -> list[str]:
    """Differences in setting between two runs: machine, threads, precision and versions."""
    settings = {
        "machine": where,
        "threads": lambda r: r["machine"]["threads"],
        "fp32 products": lambda r: r["float32_matmul_precision"],
        "torch": lambda r: r["versions"].get("torch"),
        "triton": lambda r: r["versions"].get("triton"),
    }
    return [f"{name}: {get(old)} -> {get(new)}" for name, get in settings.items() if get(old) != get(new)]


def _print_comparison(old: Path, new: Path, results: Sequence[Result]) -> int:
    print(f"## {new.name} against {old.name}\n")
    for line in _different_setting(*results):
        print(f"not the same setting, {line}")
    changes = compare(*results)
    for heading, lines in changes.items():
        print(f"\n### {heading}\n\n" + ("\n".join(f"- {line}" for line in lines) or "nothing"))
    return 1 if changes["slower"] or changes["more memory"] else 0


# --- README ---


def block(readme: Path, files: Sequence[Path]) -> str:
    """The text between the markers of ``readme``: for each file its setting, a compact table, and its charts."""

    def link(path: Path) -> str:
        return Path(os.path.relpath(path.resolve(), readme.resolve().parent)).as_posix()

    parts = [f"<!-- Written by `python -m benchmarks.report --readme {readme.name} FILE.json ...`, do not edit. -->"]
    for file in files:
        result = read(file)
        lines = [f"### {where(result)}, {result['date'][:10]}", "", *(f"- {line}" for line in header(result))]
        lines.append(f"- all contenders, with memory and rates: [{file.name}]({link(file)})")
        lines += ["", LEGEND, "", summary(result)]
        for picture in charts.paths(result, file):
            kind = picture.stem.removeprefix(file.stem).strip("-").replace("-", " ") or "speed-up"
            lines += ["", f"![{kind}, {where(result)}]({link(picture)})"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def splice(content: str, inside: str, name: str = "README.md") -> str:
    """``content`` with everything between its two marker lines replaced by ``inside``.

    Raises:
        ValueError: there is not exactly one marker of each kind, in the right order.
    """
    begin, end = _markers(content, name)
    return f"{content[:begin]}\n\n{inside}\n\n{content[end:]}"


def named_files(content: str, readme: Path) -> list[Path]:
    """The result files that the block of ``readme`` links to.

    Raises:
        ValueError: the markers are missing, or there is no link between them.
    """
    begin, end = _markers(content, readme.name)
    files = [readme.parent / link for link in re.findall(r"\]\(([^)]+\.json)\)", content[begin:end])]
    if not files:
        raise ValueError(f"{readme}: no result file is named between the markers; give the files")
    return files


def _markers(content: str, name: str) -> tuple[int, int]:
    """Start and end of the text between the markers."""
    counts = [len(re.findall(rf"^{re.escape(marker)}[ \t]*\r?$", content, re.M)) for marker in (BEGIN, END)]
    if counts != [1, 1] or content.index(BEGIN) > content.index(END):
        raise ValueError(
            f"{name}: got {counts[0]} lines {BEGIN!r} and {counts[1]} lines {END!r}, expected one each, in this order"
        )
    return content.index(BEGIN) + len(BEGIN), content.index(END)


def _update(readme: Path, files: Sequence[Path], check: bool) -> int:
    content = readme.read_bytes().decode("utf-8")
    files = files or named_files(content, readme)
    updated = splice(content, block(readme, files), str(readme))
    pictures = [picture for file in files for picture in charts.paths(read(file), file)]
    if check:
        missing = [f"missing chart: {picture}" for picture in pictures if not picture.is_file()]
        names = (str(readme), "what the files give")
        changes = difflib.unified_diff(content.splitlines(), updated.splitlines(), *names, n=0, lineterm="")
        lines = [*missing, *changes]
        print("\n".join(lines) or f"{readme}: the results are those of the files")
        return 1 if lines else 0
    for file in files:
        charts.draw(read(file), file)
    if updated != content:
        with atomic_path(readme) as temporary:
            temporary.write_bytes(updated.encode("utf-8"))
    print(f"{readme}: results of {', '.join(file.name for file in files)}")
    return 0


# --- command ---


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="JSON files written by pytest benchmarks")
    parser.add_argument("--no-chart", action="store_true", help="do not draw the charts")
    parser.add_argument("--summary", action="store_true", help="one line per comparison, and no charts")
    parser.add_argument("--readme", type=Path, metavar="README.md", help="rewrite the results between its two markers")
    parser.add_argument("--check", action="store_true", help="with --readme: write nothing, exit 1 if it would change")
    options = parser.parse_args(arguments)
    if options.check and not options.readme:
        parser.error("--check: got no --readme, expected one to check")
    if not options.files and not options.check:
        parser.error("files: got none, expected JSON files written by pytest benchmarks")
    try:
        if options.readme:
            return _update(options.readme, options.files, options.check)
        return _print(options.files, options.summary, not options.no_chart and not options.summary)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _print(files: Sequence[Path], brief: bool, drawn: bool) -> int:
    results = [read(path) for path in files]
    for path, result in zip(files, results):
        if brief:
            print("\n".join(f"- {line}" for line in header(result)) + f"\n\n{summary(result)}\n")
            continue
        print(f"## {path.parent.name}, {path.stem}\n\n{markdown(result)}\n")
        for picture in charts.draw(result, path) if drawn else []:
            print(f"chart: {picture}")
    if len(results) < 2:
        return 0
    return _print_comparison(files[0], files[-1], (results[0], results[-1]))


if __name__ == "__main__":
    sys.exit(main())
