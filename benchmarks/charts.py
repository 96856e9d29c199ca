"""Result files as figures (needs matplotlib): speed-ups, roofline, time and memory against tokens.

Each kind of chart that a file has rows for is written beside the file, as several pictures if it has more than twelve
panels: ``FILE.png`` (speed-ups), ``FILE-roofline.png``, ``FILE-time.png``, ``FILE-memory.png``. This library is red in
all charts.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import roofline
from benchmarks.tables import (
    Comparison,
    Result,
    Row,
    comparisons,
    curve,
    digits,
    duration,
    exponents,
    growths,
    is_ours,
    memory,
    tables,
    tokens,
    where,
)

PANELS = 12
MOST_NUMBERED = 6
OURS = ("#c0392b", "#e67e22", "#8e44ad", "#d81b60", "#a04000")
PEERS = ("#2c6fa6", "#2a9d8f", "#6c757d", "#7a8b2f", "#5b5ea6", "#b08900", "#3d5a80", "#17808c", "#999999")
REFERENCE = "#3b3b3b"
PLAIN = "#8a97a6"


def _figure(width: float, height: float, title: str) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts need the package matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height))
    figure.text(0.15 / width, 1 - 0.12 / height, title, size=10, weight="bold", va="top")
    return figure


def _subtitle(figure: Any, words: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(0.15 / width, 1 - 0.36 / height, words, size=8, va="top")


def _axis(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes placed in inches from the upper left corner, so that panels have the same size in every figure."""
    w, h = figure.get_size_inches()
    axis = figure.add_axes((left / w, 1 - (top + height) / h, width / w, height / h))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)
    return axis


def colors(contenders: Iterable[str], references: Iterable[str]) -> dict[str, str]:
    """A color per contender: warm for this library, dark for the reference, cold for peers."""
    reference_names, out = set(references), {}
    warm, cold = iter(OURS * 9), iter(PEERS * 9)
    for name in dict.fromkeys(contenders):
        out[name] = next(warm) if name.startswith("hpdm") else REFERENCE if name in reference_names else next(cold)
    return out


# --- speed-ups ---


def speedup_panels(result: Result) -> list[tuple[str, list[tuple[str, Comparison]]]]:
    """The comparisons of each group, each with a label."""
    out: dict[str, list[tuple[str, Comparison]]] = {}
    for (group, shape, direction), rows in tables(result["rows"]).items():
        for comparison in comparisons(rows):
            label = ", ".join(filter(None, (shape, direction, comparison.arithmetic)))
            out.setdefault(group, []).append((label, comparison))
    return list(out.items())


def _draw_speedups(result: Result, panels: Sequence[Any], path: Path) -> None:
    line, gap, label, width, between = 0.36, 0.62, 2.35, 2.75, 0.25
    heights = [line * len(entries) + gap for _, entries in panels]
    columns: list[list[int]] = [[], []]
    for n in range(len(panels)):
        full = sum(heights[:n]) + heights[n] / 2 > sum(heights) / 2
        columns[int(full and len(panels) > 1)].append(n)
    columns = [column for column in columns if column]
    column_width = label + width + between
    tall = max(sum(heights[n] for n in column) for column in columns)
    title = f"Speed-up over the paper's formula in plain PyTorch, {where(result)}"
    figure = _figure(max(column_width * len(columns) + 0.2, 7.5), tall + 0.75, title)
    _subtitle(
        figure, "red: ours; gray: the strongest peer in the same run, no less exact; dashed: as fast as the formula"
    )
    for c, column in enumerate(columns):
        top = 0.75
        for n in column:
            name, entries = panels[n]
            axis = _axis(figure, c * column_width + label, top + 0.22, width, line * len(entries))
            top += heights[n]
            _draw_bars(axis, name, entries)
    figure.savefig(path, dpi=130)


def _draw_bars(axis: Any, title: str, entries: Sequence[tuple[str, Comparison]]) -> None:
    most = 1.0
    for at, (_, comparison) in enumerate(entries):
        for row, color, shift in ((comparison.ours, OURS[0], -0.19), (comparison.peer, PLAIN, 0.19)):
            if row is None:
                continue
            value = comparison.speedup(row)
            most = max(most, value)
            name = "" if row is comparison.ours else f", {row['contender']}"
            axis.barh(at + shift, value, 0.34, color=color)
            words = f" {value:.2f}x, {duration(row['median_s'])}{name}"
            axis.text(value, at + shift, words, size=6, va="center", clip_on=False)
    axis.axvline(1, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
    axis.set_yticks(range(len(entries)), ["\n".join(textwrap.wrap(label, 38)) for label, _ in entries], size=6.5)
    axis.set_ylim(len(entries) - 0.45, -0.55)
    # Leaves room for the text to the right of the longest bar.
    axis.set_xlim(0, 2.3 * most)
    axis.set_xticks([t for t in axis.get_xticks() if 0 <= t <= 1.1 * most])
    axis.tick_params(axis="y", length=0)
    axis.set_title(title, size=8.5, loc="left", weight="bold", pad=3)


# --- roofline ---


def roofline_panels(result: Result) -> list[tuple[str, list[Row]]]:
    """Rows with known bytes, FLOPs and time by group, without measurements against tokens."""
    out: dict[str, list[Row]] = {}
    for row in result["rows"] if "copy_gbs" in result["machine"] else ():
        if row.get("bytes") and row.get("flops") and row["median_s"] and tokens(row) is None:
            out.setdefault(row["group"], []).append(row)
    return list(out.items())


def _draw_roofline(result: Result, panels: Sequence[tuple[str, list[Row]]], path: Path) -> None:
    machine = result["machine"]
    columns = 1 if len(panels) == 1 else 2
    wide, plot = 6.9, 4.0
    # The legend beside a panel may be taller than the panel.
    entries = max(len({r["contender"] for r in rows}) for _, rows in panels) + MOST_NUMBERED
    high = max(4.1, 0.9 + 0.24 * (entries + 2))
    lines = -(-len(panels) // columns)
    title = f"Roofline, ceilings measured in the same run, {where(result)}"
    figure = _figure(max(wide * columns, 7.5), high * lines + 0.8, title)
    words = "FLOP and bytes are those of the formula: above the roof is what gets by with fewer products"
    _subtitle(figure, words)
    for n, (group, rows) in enumerate(panels):
        axis = _axis(figure, wide * (n % columns) + 0.65, high * (n // columns) + 0.95, plot, high - 1.0)
        _draw_roof(axis, rows, machine)
        axis.set_title(group, size=9, loc="left", weight="bold")
    figure.savefig(path, dpi=130)


def _draw_roof(axis: Any, rows: Sequence[Row], machine: Mapping[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    copy = machine["copy_gbs"] / 1e3  # TFLOP/s at one FLOP per byte
    arithmetics = dict.fromkeys(row.get("arithmetic") or "ieee" for row in rows)
    roofs = {a: roofline.matmul_ceiling(a, machine) for a in arithmetics}
    known = {a: roof for a, roof in roofs.items() if roof}
    intensities = [row["flops"] / row["bytes"] for row in rows]
    tallest = max(known.values(), default=max(row["tflops"] for row in rows))
    low, high = min(*intensities, tallest / copy) / 2.5, max(*intensities, tallest / copy) * 2
    bottom = min(min(row["tflops"] for row in rows) / 1.6, copy * low)
    top = 1.4 * max(tallest, *(row["tflops"] for row in rows))
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())

    slope = [low, tallest / copy]
    axis.plot(slope, [copy * x for x in slope], color="#555555", linewidth=1.1)
    # The text runs along the slope, whose angle depends on the size of the panel.
    w, h = (a * b for a, b in zip(axis.get_position().size, axis.figure.get_size_inches()))
    angle = math.degrees(math.atan2(h / math.log(top / bottom), w / math.log(high / low)))
    middle = math.sqrt(slope[0] * slope[1])
    words = f"copy {digits(machine['copy_gbs'])} GB/s"
    axis.text(middle * 0.93, copy * middle * 1.05, words, size=6.5, rotation=angle, rotation_mode="anchor", ha="center")
    for arithmetic, roof in known.items():
        axis.plot([max(low, roof / copy), high], [roof, roof], color="#555555", linewidth=1.1, zorder=0)
        name = "fp32" if arithmetic == "ieee" else arithmetic
        axis.text(high, roof * 1.02, f"{name} matmul {roof:.3g} TFLOP/s", size=6.5, ha="right", va="bottom")

    paint = colors((row["contender"] for row in rows), [row["contender"] for row in rows if row["reference"]])
    for row in rows:
        highlighted = is_ours(row)
        color = paint[row["contender"]]
        axis.scatter(
            row["flops"] / row["bytes"], row["tflops"], marker="*" if highlighted else "o", s=60 if highlighted else 20,
            facecolors=color if row["direction"] == "fwd" else "none", edgecolors=color, linewidths=0.9,
            zorder=3 if highlighted else 2,
        )  # fmt: skip
    for name, color in paint.items():
        words = "\n".join(textwrap.wrap(name, 32))
        axis.scatter([], [], marker="*" if name.startswith("hpdm") else "o", s=40, color=color, label=words)
    axis.scatter([], [], marker="o", s=20, color="#555555", label="filled: forward")
    axis.scatter([], [], marker="o", s=20, facecolors="none", edgecolors="#555555", label="hollow: with backward")
    _number_shapes(axis, rows)
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=6.5, frameon=False, labelspacing=0.6)
    axis.grid(alpha=0.25, which="major")
    axis.set_xlabel("arithmetic intensity: FLOP per byte", size=7.5)
    axis.set_ylabel("TFLOP/s", size=7.5)


def _number_shapes(axis: Any, rows: Sequence[Row]) -> None:
    """Writes each shape's number under its points, unless there are too many; points of similar intensity share one."""
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if len(shapes) > MOST_NUMBERED:
        return
    places: dict[int, list[Row]] = {}
    for row in rows:
        places.setdefault(round(math.log(row["flops"] / row["bytes"]) / 0.15), []).append(row)
    for points in places.values():
        numbers = sorted({shapes.index(row["shape"]) + 1 for row in points})
        x = math.exp(sum(math.log(row["flops"] / row["bytes"]) for row in points) / len(points))
        at = (x, min(row["tflops"] for row in points))
        words = ",".join(map(str, numbers))
        axis.annotate(words, at, xytext=(0, -6), textcoords="offset points", size=6.5, ha="center", va="top")
    for number, shape in enumerate(shapes, 1):
        axis.plot([], [], " ", marker=f"${number}$", color="black", label="\n".join(textwrap.wrap(shape, 32)))


# --- against tokens ---


def token_panels(result: Result, field: str) -> list[tuple[str, dict[str, list[Row]]]]:
    """For each group and direction, the contenders that have ``field`` for two or more numbers of tokens."""
    out = []
    for (group, direction), contenders in growths(result["rows"]).items():
        measured = {name: rows for name, rows in contenders.items() if len(set(curve(rows, field)[0])) > 1}
        if measured:
            out.append((f"{group}, {direction}", measured))
    return out


def _draw_tokens(result: Result, panels: Sequence[Any], path: Path, field: str, what: str) -> None:
    columns = min(2, len(panels))
    wide, high = 5.2 if columns == 2 else 7.0, 3.9
    title = f"{what} against tokens, {where(result)}"
    figure = _figure(max(wide * columns + 0.2, 7.5), high * -(-len(panels) // columns) + 0.6, title)
    _subtitle(figure, "p: exponent of the fit ~ tokens^p to all points, and between the last two")
    for n, (name, contenders) in enumerate(panels):
        left, top = wide * (n % columns) + 0.75, high * (n // columns) + 0.85
        axis = _axis(figure, left, top, wide - 1.0, high - 0.85)
        _draw_curves(axis, contenders, field)
        axis.set_title("\n".join(textwrap.wrap(name, 62)), size=8, loc="left", weight="bold")
    figure.savefig(path, dpi=130)


def _draw_curves(axis: Any, contenders: Mapping[str, Sequence[Row]], field: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    unit: Callable[[float], str] = duration if field == "median_s" else memory
    references = [row["contender"] for rows in contenders.values() for row in rows if row["reference"]]
    paint = colors(contenders, references)
    points: list[tuple[float, float]] = []
    ends: list[tuple[str, float, float]] = []
    for name, rows in contenders.items():
        xs, ys = curve(rows, field)
        highlighted = name.startswith("hpdm")
        axis.plot(
            xs, ys, color=paint[name], marker="*" if highlighted else "o", markersize=8 if highlighted else 4,
            linewidth=1.8 if highlighted else 1.2, zorder=3 if highlighted else 2,
            label=f"{name}: p = {exponents(xs, ys)}",
        )  # fmt: skip
        ends.append((paint[name], xs[-1], ys[-1]))
        points += zip(xs, ys)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    # A line of linear growth through the last point of this library, or of the first contender.
    name = next((name for name in contenders if name.startswith("hpdm")), next(iter(contenders)))
    xs, ys = curve(contenders[name], field)
    axis.plot([first, xs[-1]], [ys[-1] * first / xs[-1], ys[-1]], ":", color="#777777", linewidth=1, label="linear")
    axis.set(xscale="log", yscale="log", xlim=(first / 1.4, last * 2.9), ylim=(low / 3, high * 3))
    _label_ends(axis, ends, unit)
    powers = range(math.ceil(math.log2(first)), math.floor(math.log2(last)) + 1)
    axis.set_xticks([2**n for n in powers], [f"$2^{{{n}}}$" for n in powers])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: unit(y)))
    axis.grid(alpha=0.25, which="major")
    axis.set_xlabel("tokens", size=7.5)
    axis.legend(loc="lower right", fontsize=6.5, framealpha=0.9)


def _label_ends(axis: Any, ends: Sequence[tuple[str, float, float]], unit: Callable[[float], str]) -> None:
    """Labels each curve's last point with its value, without overlaps: to the right, or above if other curves go on."""
    last_x = max(x for _, x, _ in ends)
    # Height of a line of text, in units of the logarithmic axis.
    low, high = (math.log10(limit) for limit in axis.get_ylim())
    line = 0.035 * (high - low)
    free: dict[float, float] = {}
    for color, x, y in sorted(ends, key=lambda end: end[2]):
        above = math.log10(y if x == last_x else max(other for _, at, other in ends if at == x))
        height = max(above, free.get(x, -math.inf))
        free[x] = height + line
        offset, ha, va = ((6, 0), "left", "center") if x == last_x else ((-4, 3), "right", "bottom")
        axis.annotate(
            unit(y), (x, 10**height), xytext=offset, textcoords="offset points", size=6.5, ha=ha, va=va, color=color,
            annotation_clip=False,
        )  # fmt: skip


# --- files ---


def _plan(result: Result) -> list[tuple[str, Sequence[Any], Callable[[Result, Sequence[Any], Path], None]]]:
    """Suffix, panels and drawing function of each picture that the file has rows for."""
    kinds: list[tuple[str, Sequence[Any], Callable[[Result, Sequence[Any], Path], None]]] = [
        ("", speedup_panels(result), _draw_speedups),
        ("-roofline", roofline_panels(result), _draw_roofline),
    ]
    for suffix, field, what in (("-time", "median_s", "Time"), ("-memory", "peak_extra_bytes", "Memory")):
        kinds.append((suffix, token_panels(result, field), partial(_draw_tokens, field=field, what=what)))
    out = []
    for suffix, panels, painter in kinds:
        for page, start in enumerate(range(0, len(panels), PANELS)):
            out.append((suffix + (f"-{page + 1}" if page else ""), panels[start : start + PANELS], painter))
    return out


def paths(result: Result, path: Path) -> list[Path]:
    """The pictures that :func:`draw` writes for ``path`` (``FILE.png`` or ``FILE.json``)."""
    return [path.with_name(f"{path.stem}{suffix}.png") for suffix, _, _ in _plan(result)]


def draw(result: Result, path: Path) -> list[Path]:
    """Draws every chart that the file has rows for; returns the paths of the pictures.

    Raises:
        ImportError: matplotlib is not installed.
    """
    targets = paths(result, path)
    for target, (_, panels, painter) in zip(targets, _plan(result)):
        painter(result, panels, target)
    return targets
