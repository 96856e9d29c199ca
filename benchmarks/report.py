"""Tables and charts from the JSON files of ``pytest benchmarks``.

``python -m benchmarks.report FILE.json`` prints Markdown tables and draws ``FILE.png``, with ``--summary`` one line per
comparison: the reference, the fastest peer, ours;
``python -m benchmarks.report OLD.json NEW.json`` also prints what got slower from one to the other, and exits 1 if
anything did.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("contender", "median", "IQR", "speed-up", "GB/s", "% copy", "TFLOP/s", "% matmul", "extra memory")


def duration(seconds: float | None) -> str:
    """Three significant digits with a unit: ``1.23 ms``."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def memory(size: int | None) -> str:
    """Three significant digits with a decimal unit, as the paper's tables: ``1.23 GB``."""
    if size is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _number(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form)


def _cells(row: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    name = row["contender"] + (" *" if row["reference"] else "")
    if row["error"]:
        return [name, f"could not run: {row['error'][:90]}", *[""] * (len(COLUMNS) - 2)]
    gbs, tflops = row["gbs"], row["tflops"]
    copy, matmul = machine.get("copy_gbs"), machine.get("matmul_fp32_tflops")
    speedup = row["speedup_vs_reference"]
    return [
        name,
        duration(row["median_s"]),
        duration(row["iqr_s"]),
        "-" if speedup is None else f"{speedup:.2f}x",
        _number(gbs),
        _number(100 * gbs / copy if gbs and copy else None, ".0f"),
        _number(tflops),
        _number(100 * tflops / matmul if tflops and matmul else None, ".0f"),
        memory(row["peak_extra_bytes"]),
    ]


def tables(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[Mapping[str, Any]]]:
    """Rows by (group, shape, direction), in the order of the run."""
    out: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault((row["group"], row["shape"], row["direction"]), []).append(row)
    return out


def header(result: Mapping[str, Any]) -> list[str]:
    """What the numbers were measured on and with."""
    machine = result["machine"]
    where = machine.get("gpu") or machine["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    return [
        f"{where}; {machine['threads']} threads on {machine['cores']} cores; {versions}",
        f"fp32 products: {result['float32_matmul_precision']}; commit {result['commit']}; {result['date']}",
        f"ceilings measured in the same run: copy {machine['copy_gbs']:.3g} GB/s, "
        f"fp32 matmul {machine['matmul_fp32_tflops']:.3g} TFLOP/s",
        "GB/s and TFLOP/s count what the op must move and compute, not what a contender does; "
        "* is the reference of the speed-ups",
        f"command: {result['command']}",
    ]


def text(result: Mapping[str, Any]) -> str:
    """Plain tables for a terminal."""
    lines = header(result)
    for (group, shape, direction), rows in tables(result["rows"]).items():
        grid = [list(COLUMNS), *(_cells(row, result["machine"]) for row in rows)]
        good = [cells for cells in grid if not cells[1].startswith("could not")]
        widths = [max(len(cells[i]) for cells in good) for i in range(len(COLUMNS))]
        widths[0] = max(len(cells[0]) for cells in grid)
        lines += ["", f"{group} | {shape} | {direction}"]
        for cells in grid:
            first, *rest = cells
            lines.append(f"  {first:<{widths[0]}}  " + "  ".join(c.rjust(w) for c, w in zip(rest, widths[1:])).rstrip())
    return "\n".join(lines)


def markdown(result: Mapping[str, Any]) -> str:
    """The same tables in Markdown."""
    lines = [f"- {line}" for line in header(result)]
    for (group, shape, direction), rows in tables(result["rows"]).items():
        lines += ["", f"### {group}: {shape}, {direction}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
        lines += ["| " + " | ".join(_cells(row, result["machine"])) + " |" for row in rows]
    return "\n".join(lines)


def summary(result: Mapping[str, Any]) -> str:
    """One line per comparison in Markdown: the reference, the fastest peer and our fastest, and ours against both."""
    lines = [
        "| op | shape | | reference | strongest peer | ours | against reference | against peer |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for (group, shape, direction), rows in tables(result["rows"]).items():
        timed = [row for row in rows if row["median_s"]]
        ours = min((r for r in timed if r["contender"].startswith("hpdm")), key=lambda r: r["median_s"], default=None)
        reference = next((r for r in timed if r["reference"]), None)
        if ours is None or reference is None:
            continue
        others = [r for r in timed if not r["contender"].startswith("hpdm") and not r["reference"]]
        peer = min(others, key=lambda r: r["median_s"], default=None)
        cells = [group, shape, direction, duration(reference["median_s"])]
        cells += [f"{peer['contender']}, {duration(peer['median_s'])}" if peer else "-", duration(ours["median_s"])]
        cells += [f"{reference['median_s'] / ours['median_s']:.2f}x"]
        cells += [f"{peer['median_s'] / ours['median_s']:.2f}x" if peer else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """One horizontal bar per contender, its speed-up over the reference; one panel per table.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = [(result, key, rows) for result in results for key, rows in tables(result["rows"]).items()]
    panels = [(result, key, [r for r in rows if r["speedup_vs_reference"]]) for result, key, rows in panels]
    panels = [panel for panel in panels if panel[2]]
    columns = min(3, 1 + len(panels) // 6)
    lines = -(-len(panels) // columns)
    tallest = max((len(rows) for _, _, rows in panels), default=1)
    figure = Figure(figsize=(7.5 * columns, max(1.5, lines * (0.7 + 0.24 * tallest) + 0.5)), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat) if panels else []
    for spare in grid[len(panels) :]:
        spare.set_axis_off()
    for (_, (group, shape, direction), rows), axis in zip(panels, grid):
        names = [row["contender"] for row in rows]
        values = [row["speedup_vs_reference"] for row in rows]
        colours = ["#c9504b" if name.startswith("hpdm") else "#8a97a6" for name in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f"{v:.2f}x, {duration(r['median_s'])}" for v, r in zip(values, rows)], padding=3, size=7)
        axis.set_title(f"{group}: {shape}, {direction}", size=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.25 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("speed-up over the reference" + (f", {_where(results)}" if results else ""), size=9)
    figure.savefig(path, dpi=120)
    return path


def _where(results: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(dict.fromkeys(r["machine"].get("gpu") or r["machine"]["cpu"] for r in results))


def slower(old: Mapping[str, Any], new: Mapping[str, Any], margin: float = 1.1) -> list[str]:
    """What takes more than ``margin`` times as long in ``new``, and by more than both interquartile ranges."""

    def by_key(result: Mapping[str, Any]) -> dict[tuple[str, ...], Mapping[str, Any]]:
        keys = ("group", "shape", "direction", "contender")
        return {tuple(row[k] for k in keys): row for row in result["rows"] if row["median_s"]}

    before, after, lines = by_key(old), by_key(new), []
    for key in before.keys() & after.keys():
        was, now = before[key], after[key]
        noise = was["iqr_s"] + now["iqr_s"]
        if now["median_s"] > margin * was["median_s"] and now["median_s"] - was["median_s"] > noise:
            ratio = now["median_s"] / was["median_s"]
            lines.append(
                f"{' | '.join(key)}: {duration(was['median_s'])} -> {duration(now['median_s'])} ({ratio:.2f}x)"
            )
    return sorted(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables of the files; returns 1 if something got slower from the first to the last of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files written by pytest benchmarks")
    parser.add_argument("--no-chart", action="store_true", help="do not draw the charts")
    parser.add_argument("--summary", action="store_true", help="one line per comparison, and no charts")
    options = parser.parse_args(arguments)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    for path, result in zip(options.files, results):
        if options.summary:
            print("\n".join(f"- {line}" for line in header(result)) + f"\n\n{summary(result)}\n")
            continue
        print(f"## {path.parent.name}, {path.stem}\n\n{markdown(result)}\n")
        if not options.no_chart:
            print(f"chart: {chart([result], path.with_suffix('.png'))}\n")
    if len(results) < 2:
        return 0
    lines = slower(results[0], results[-1])
    print(f"## slower in {options.files[-1].name} than in {options.files[0].name}\n")
    print("\n".join(f"- {line}" for line in lines) or "nothing")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
