"""Result files of ``pytest benchmarks`` as text: numbers with units, tables for a terminal and in Markdown.

Rows with ``extra["tokens"]`` become one table per group, with a line per number of tokens and a column per contender.
Every other entry of ``extra`` becomes a column. Empty columns are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu import roofline

Row = Mapping[str, Any]
Result = Mapping[str, Any]
Key = tuple[str, str, str]


def duration(seconds: float | None) -> str:
    """Three significant digits with a unit: ``1.23 ms``."""
    return _with_unit(seconds, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)))


def memory(size: float | None) -> str:
    """Three significant digits with a decimal unit, as the paper's tables: ``1.23 GB``."""
    return _with_unit(size, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def _with_unit(value: float | None, units: Sequence[tuple[str, float]]) -> str:
    if value is None:
        return "-"
    # The rounded number decides the unit: 999.7 us are shown as 1 ms.
    unit, size = next((pair for pair in units if float(f"{value / pair[1]:.3g}") >= 1), units[-1])
    return f"{digits(value / size)} {unit}"


def digits(value: float) -> str:
    """Three significant digits, but all digits before the point, without an exponent: ``1.23``, ``45.6``, ``1235``."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def is_ours(row: Row) -> bool:
    """Whether the contender is this library, not the paper's formula or a peer."""
    return bool(row["contender"].startswith("hpdm"))


def tokens(row: Row) -> int | None:
    """The number of tokens, for rows that measure growth with it; else ``None``."""
    return (row.get("extra") or {}).get("tokens")


def notes(row: Row) -> dict[str, Any]:
    """The entries of a row's ``extra`` that become columns."""
    shown_elsewhere = ("tokens", "time_exponent", "memory_exponent")
    return {name: value for name, value in (row.get("extra") or {}).items() if name not in shown_elsewhere}


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """``p`` of the least-squares fit ``y ~ x^p``; ``None`` for fewer than two different ``x``."""
    points = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True)]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def exponents(xs: Sequence[float], ys: Sequence[float]) -> str:
    """The exponent of the fit to all points, and between the last two: ``0.72, last 0.97``."""
    p, last = exponent(xs, ys), exponent(xs[-2:], ys[-2:])
    return "-" if p is None or last is None else f"{p:.2f}, last {last:.2f}"


def curve(rows: Iterable[Row], field: str) -> tuple[list[int], list[float]]:
    """Tokens, and ``field`` (``"median_s"`` or ``"peak_extra_bytes"``) of the rows that have it, sorted by tokens."""
    points = sorted((tokens(row) or 0, row[field]) for row in rows if tokens(row) and row.get(field))
    return [x for x, _ in points], [y for _, y in points]


def tables(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    """Rows without tokens by (group, shape, direction), in the order of the run."""
    out: dict[Key, list[Row]] = {}
    for row in rows:
        if tokens(row) is None:
            out.setdefault((row["group"], row["shape"], row["direction"]), []).append(row)
    return out


def growths(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Rows with tokens by (group, direction) and contender."""
    out: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if tokens(row) is not None:
            out.setdefault((row["group"], row["direction"]), {}).setdefault(row["contender"], []).append(row)
    return out


def where(result: Result) -> str:
    """The name of the GPU, or of the CPU if there is no GPU."""
    return str(result["machine"].get("gpu") or result["machine"]["cpu"])


def header(result: Result) -> list[str]:
    """Lines that describe the setting of the measurement."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    names = {"ieee": "fp32", "tf32": "TF32", "bf16": "bf16"}
    products = {name: roofline.matmul_ceiling(arithmetic, machine) for arithmetic, name in names.items()}
    ceilings = [f"copy {digits(machine['copy_gbs'])} GB/s"] if "copy_gbs" in machine else []
    ceilings += [f"{name} matmul {rate:.3g} TFLOP/s" for name, rate in products.items() if rate]
    lines = [
        f"{where(result)}; {machine['threads']} threads on {machine['cores']} cores; {versions}",
        f"fp32 products: {result['float32_matmul_precision']}; commit {result['commit']}; {result['date']}",
        f"ceilings measured in the same run: {', '.join(ceilings) or 'none'}",
        "GB/s and TFLOP/s count what the op must move and compute, not what a contender does; "
        "* is the reference of the speed-ups",
        f"command: {result['command']}",
    ]
    outcomes = [test["outcome"] for test in result.get("tests") or []]
    if outcomes:
        skipped = f", {outcomes.count('skipped')} skipped" if "skipped" in outcomes else ""
        lines.append(f"{outcomes.count('passed')} of {len(outcomes)} tests passed{skipped}")
    return lines


def _speedup(row: Row, machine: Mapping[str, Any]) -> str:
    value = row.get("speedup_vs_reference")
    return "-" if value is None else f"{value:.2f}x"


def _share(rate: float | None, ceiling: float | None) -> str:
    return f"{100 * rate / ceiling:.0f}" if rate and ceiling else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


COLUMNS: dict[str, Callable[[Row, Mapping[str, Any]], str]] = {
    "median": lambda row, machine: duration(row["median_s"]),
    "IQR": lambda row, machine: duration(row["iqr_s"]),
    "speed-up": _speedup,
    "GB/s": lambda row, machine: _number(row["gbs"]),
    "% copy": lambda row, machine: _share(row["gbs"], machine.get("copy_gbs")),
    "TFLOP/s": lambda row, machine: _number(row["tflops"]),
    "% matmul": lambda row, machine: _share(
        row["tflops"], roofline.matmul_ceiling(row.get("arithmetic") or "ieee", machine)
    ),
    "extra memory": lambda row, machine: memory(row["peak_extra_bytes"]),
}


def _note(name: str, value: Any) -> tuple[str, str]:
    """Title and cell: ``videos_per_s: 2.345`` becomes ``videos/s | 2.35``, ``cache_bytes: 2e9`` ``cache | 2 GB``."""
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes").replace("_", " "), memory(value)
    title = " ".join({"gb": "GB", "tflop": "TFLOP"}.get(w, w) for w in name.replace("_per_", "/").split("_"))
    if value is None:
        return title, "-"
    if isinstance(value, bool):
        return title, "yes" if value else "no"
    return title, digits(value) if isinstance(value, float) else str(value)


def grid(rows: Sequence[Row], machine: Mapping[str, Any], lead: Sequence[str] = ()) -> list[list[str]]:
    """A table's cells, titles first; ``lead`` names the fields in the columns before the contender.

    If a contender could not run, the reason is in the column after its name.
    """
    by_title: list[dict[str, str]] = []
    for row in rows:
        cells = {name: str(row[name]) for name in lead}
        cells["contender"] = row["contender"] + (" *" if row["reference"] else "")
        if row["error"]:
            cells["error"] = f"could not run: {row['error'][:90]}"
        else:
            cells |= {name: column(row, machine) for name, column in COLUMNS.items()}
            cells |= dict(_note(name, value) for name, value in notes(row).items())
        by_title.append(cells)
    titles = [*lead, "contender"]
    titles += [t for t in dict.fromkeys(t for c in by_title for t in c) if t not in (*titles, "error")]
    full = [t for t in titles if t in (*lead, "contender") or any(c.get(t, "-") != "-" for c in by_title)]
    full += ["median"] if "median" not in full and any("error" in c for c in by_title) else []
    at = len(lead) + 1
    lines = [full]
    for cells in by_title:
        line = [cells.get(t, "-") for t in full]
        lines.append([*line[:at], cells["error"], *[""] * (len(full) - at - 1)] if "error" in cells else line)
    return lines


def growth_grid(contenders: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """A line per number of tokens, a column per contender; the last line has the exponents ``p`` of ``~ tokens^p``."""
    fields = {"": ("median_s", duration), ", memory": ("peak_extra_bytes", memory)}
    titles, columns, fits = ["tokens"], [], ["p of ~ tokens^p"]
    for name, rows in contenders.items():
        for suffix, (field, unit) in fields.items():
            xs, ys = curve(rows, field)
            if xs:
                titles.append(name + suffix)
                columns.append(dict(zip(xs, map(unit, ys))))
                fits.append(exponents(xs, ys))
    sizes = sorted({x for column in columns for x in column})
    return [titles, *([str(n), *(c.get(n, "-") for c in columns)] for n in sizes), fits]


def in_markdown(lines: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """Cells as a Markdown table, the first ``words`` columns flush left."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    out = ["| " + " | ".join(line) + " |" for line in escaped]
    rule = "|" + "---|" * words + "---:|" * (len(lines[0]) - words)
    return [out[0], rule, *out[1:]]


def _plain(lines: Sequence[Sequence[str]]) -> list[str]:
    # Reasons why a contender could not run are long and must not widen the columns.
    measured = [line for line in lines if len(line) < 2 or not line[1].startswith("could not")]
    widths = [max(len(line[i]) for line in (lines if i == 0 else measured)) for i in range(len(lines[0]))]
    rows = [[line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines]
    return ["  " + "  ".join(row).rstrip() for row in rows]


def _all(result: Result) -> list[tuple[str, list[list[str]]]]:
    out = [
        (f"{group}: {shape}, {direction}", grid(rows, result["machine"]))
        for (group, shape, direction), rows in tables(result["rows"]).items()
    ]
    out += [
        (f"{group}, {direction}", growth_grid(contenders))
        for (group, direction), contenders in growths(result["rows"]).items()
    ]
    return out


def text(result: Result) -> str:
    """Plain tables for a terminal."""
    lines = header(result)
    for title, cells in _all(result):
        lines += ["", title, *_plain(cells)]
    return "\n".join(lines)


def markdown(result: Result) -> str:
    """The same tables in Markdown."""
    lines = [f"- {line}" for line in header(result)]
    for title, cells in _all(result):
        lines += ["", f"### {title}", "", *in_markdown(cells)]
    return "\n".join(lines)


def summary(result: Result) -> str:
    """Markdown with one line per comparison: the reference, the strongest peer, our fastest row, and two speed-ups.

    Growth with tokens has one line per contender. Groups whose rows have ``extra`` entries, or nothing to compare, are
    shown as whole tables.
    """
    lines: list[list[str]] = []
    other: dict[str, list[Row]] = {}
    for key, rows in tables(result["rows"]).items():
        compared = [] if any(notes(row) for row in rows) else comparisons(rows)
        lines += [_summarize(key, comparison) for comparison in compared]
        if not compared:
            other.setdefault(key[0], []).extend(rows)
    parts = []
    if lines:
        titles = ["op", "shape", "", "reference", "strongest peer", "ours", "against reference", "against peer"]
        parts.append("\n".join(in_markdown([titles, *lines], words=3)))
    growth = _growth_summary(result)
    if growth:
        titles = ["growth ~ tokens^p", "", "contender", "tokens", "longest", "p", "most memory", "p"]
        parts.append("\n".join(in_markdown([titles, *growth], words=3)))
    for group, rows in other.items():
        cells = grid(rows, result["machine"], lead=("shape", "direction"))
        parts.append("\n".join([f"**{group}**", "", *in_markdown(cells, words=3)]))
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Comparison:
    """Our fastest row and the fastest rivals whose products are at least as exact."""

    arithmetic: str
    """``"tf32"`` if ours takes one TF32 pass; all rows are rivals. Else ``""``: full fp32, or three TF32 passes."""
    reference: Row
    peer: Row | None
    ours: Row

    def speedup(self, row: Row) -> float:
        """How many times as fast as the reference ``row`` is."""
        return float(self.reference["median_s"] / row["median_s"])


def comparisons(rows: Iterable[Row]) -> list[Comparison]:
    """The comparisons of a table: one, or two if we also have rows in TF32."""
    timed = [row for row in rows if row["median_s"]]

    def fastest(chosen: Iterable[Row]) -> Row | None:
        return min(chosen, key=lambda row: row["median_s"], default=None)

    def is_reference(row: Row) -> bool:
        return bool(row["reference"] or row["contender"].startswith("reference"))

    out = []
    for arithmetic in ("", "tf32"):
        inexact = [row for row in timed if row.get("arithmetic") == "tf32"]
        allowed = timed if arithmetic else [row for row in timed if row not in inexact]
        ours = fastest(row for row in (inexact if arithmetic else allowed) if is_ours(row))
        reference = fastest(row for row in allowed if is_reference(row))
        if ours is not None and reference is not None:
            peer = fastest(row for row in allowed if not is_ours(row) and not is_reference(row))
            out.append(Comparison(arithmetic, reference, peer, ours))
    return out


def _summarize(key: Key, comparison: Comparison) -> list[str]:
    group, shape, direction = key
    peer = comparison.peer
    out = [group, shape, direction + (f", {comparison.arithmetic}" if comparison.arithmetic else "")]
    out += [duration(comparison.reference["median_s"])]
    out += [
        f"{peer['contender']}, {duration(peer['median_s'])}" if peer else "-",
        duration(comparison.ours["median_s"]),
    ]
    out += [f"{comparison.speedup(comparison.ours):.2f}x"]
    return [*out, f"{peer['median_s'] / comparison.ours['median_s']:.2f}x" if peer else "-"]


def _growth_summary(result: Result) -> list[list[str]]:
    lines = []
    for (group, direction), contenders in growths(result["rows"]).items():
        for name, rows in contenders.items():
            cells = [group, direction, name]
            xs = sorted(tokens(row) or 0 for row in rows)
            cells.append(f"{xs[0]} to {xs[-1]}")
            for field, unit in (("median_s", duration), ("peak_extra_bytes", memory)):
                at, values = curve(rows, field)
                cells += [unit(values[-1]) if values else "-", exponents(at, values)]
            lines.append(cells)
    return lines
