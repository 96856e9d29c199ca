"""Merges the parts of a run, even if incomplete, into one result, as JSON and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import tables
from benchmarks.gpu.pieces import Piece
from benchmarks.gpu.suite import NOT_RUN, Suite

Part = Mapping[str, Any]


def merge(suite: Suite, environment: Mapping[str, Any], date: str) -> dict[str, Any]:
    """Merges the parts of all pieces; ``pieces`` has the state of each, ``not run`` for pieces without a part.

    ``environment`` is that of ``machine.environment`` without ceilings; the best ceilings of all parts are added.
    """
    parts = [(piece, suite.part(piece)) for piece in suite.pieces]
    reported = [part for _, part in parts if part]
    names = sorted({name for part in reported for name in part["ceilings"]})
    ceilings = {name: max(part["ceilings"][name] for part in reported if name in part["ceilings"]) for name in names}
    return {
        "date": date,
        **environment,
        "machine": {**environment["machine"], **ceilings},
        "pieces": [_line(piece, part) for piece, part in parts],
        "tests": [{**test, "piece": part["piece"]} for part in reported for test in part["tests"]],
        "rows": [row for part in reported for row in part["rows"]],
    }


def _line(piece: Piece, part: Part | None) -> dict[str, Any]:
    tests = part["tests"] if part else []
    outcomes = [test["outcome"] for test in tests]
    return {
        "name": piece.name,
        "state": part["state"] if part else NOT_RUN,
        "seconds": part["seconds"] if part else None,
        "passed": outcomes.count("passed"),
        "skipped": outcomes.count("skipped"),
        "failed": len(outcomes) - outcomes.count("passed") - outcomes.count("skipped"),
        "error_of_budget": max((t["error_of_budget"] for t in tests if "error_of_budget" in t), default=None),
        "repeats": f"{sum(t.get('repeats', False) for t in tests)} of {sum('repeats' in t for t in tests)}",
        "message": part["message"] if part else "",
    }


def verdict(result: Mapping[str, Any]) -> int:
    """Exit status: 1 if a test failed or a piece crashed, else 3 if a piece is missing or was stopped, else 0."""
    if any(piece["failed"] or piece["state"] == "crashed" for piece in result["pieces"]):
        return 1
    return 3 if any(piece["state"] != "complete" for piece in result["pieces"]) else 0


def _cell(text: str, most: int = 160) -> str:
    return re.sub(r"[|\s]+", " ", text)[:most]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _pieces(result: Mapping[str, Any]) -> list[str]:
    rows = []
    for piece in result["pieces"]:
        worst, seconds = piece["error_of_budget"], piece["seconds"]
        rows.append([
            piece["name"], piece["state"], "-" if seconds is None else f"{seconds:.0f} s",
            *(str(piece[k]) for k in ("passed", "failed", "skipped")),
            "-" if worst is None else f"{worst:.2f}", "-" if worst is None else piece["repeats"],
            _cell(piece["message"]),
        ])  # fmt: skip
    head = ("piece", "state", "time", "passed", "failed", "skipped", "largest error / budget", "same bits twice", "")
    return ["## Pieces", "", *_table(head, rows)]


def _failures(result: Mapping[str, Any]) -> list[str]:
    failed = [t for t in result["tests"] if t["outcome"] not in ("passed", "skipped")]
    if not failed:
        return []
    rows = [[_cell(t["id"]), t["piece"], t["outcome"], _cell(t["message"], 300)] for t in failed]
    return ["", "## Failures", "", *_table(("test", "piece", "outcome", "message"), rows)]


def _roofline(result: Mapping[str, Any]) -> list[str]:
    """Our times against the least time of their bytes and FLOPs at the measured rates."""
    rows = []
    for row in result["rows"]:
        if row.get("floor_s") and row["contender"].startswith("hpdm"):
            cells = [row["group"], row["shape"], row["direction"], row["contender"], row["arithmetic"] or "-"]
            cells += [tables.duration(row["median_s"]), tables.duration(row["floor_s"]), row["floor_by"]]
            rows.append([*cells, f"{100 * row['share']:.0f} %"])
    if not rows:
        return []
    head = ("op", "shape", "", "contender", "products", "time", "floor", "set by", "reached")
    text = "The floor is the larger of bytes at the rate of a copy and FLOPs at the rate of a product in the same "
    text += (
        "arithmetic, both measured in the process that timed the row. Above 100 %: fewer products than the formula's."
    )
    return ["", "## Roofline", "", text, "", *_table(head, rows)]


def _ceilings(machine: Mapping[str, Any]) -> str:
    names = {
        "copy_gbs": "copy {:.0f} GB/s", "matmul_fp32_tflops": "fp32 {:.0f} TFLOP/s",
        "matmul_tf32_tflops": "TF32 {:.0f} TFLOP/s", "matmul_bf16_tflops": "bf16 {:.0f} TFLOP/s",
    }  # fmt: skip
    measured = [text.format(machine[name]) for name, text in names.items() if name in machine]
    return "ceilings: " + (", ".join(measured) or "not measured, nothing was timed")


def markdown(result: Mapping[str, Any]) -> str:
    """Markdown with pieces, failures, distances from the roofline, and the tables of the benchmarks."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    missing = [piece["name"] for piece in result["pieces"] if piece["state"] == NOT_RUN]
    lines = [f"# {machine.get('gpu') or machine['cpu']}", ""]
    lines += [f"- {versions}; commit {result['commit']}; {result['date']}", f"- {_ceilings(machine)}"]
    lines += [f"- command: {result['command']}"]
    lines += [f"- not run: {', '.join(missing)}"] if missing else []
    lines += ["", *_pieces(result), *_failures(result), *_roofline(result)]
    text = "\n".join(lines) + "\n"
    # The tables need ceilings, which are measured together with the first row.
    return text + (f"\n## Benchmarks\n\n{tables.markdown(result)}\n" if result["rows"] else "")
