"""The measurements along long videos as a table and as a plot; generated videos stand beside real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpdm.evaluation.over_time.video import MEANING
from hpdm.files import atomic_path

_SIDES = ("real", "generated")


def over_time_table(result: dict[str, Any]) -> str:
    """The tables of what was measured: motion, and distances by the features of a detector.

    Args:
        result: of :func:`hpdm.commands.evaluate_over_time.over_time`.
    """
    parts = [_motion_table(result)] if "generated" in result else []
    return "\n".join(parts + ([_distance_table(result)] if "distances" in result else []))


def _distance_table(result: dict[str, Any]) -> str:
    """A row per distance: start, end and slope of the curve."""
    found = result["distances"]
    lines = [
        f"{result['frames']} frames of {found['videos']} generated videos, {result['clip']} at a time, and "
        f"{found['real']} real clips of {result['clip']}",
        f"{'':<17}{'start':>11}{'end':>11}{'per 100 frames':>17}",
    ]
    for name, title, of, meaning in _distances(found):
        cells = f"{of['first']:>11.5g}{of['last']:>11.5g}{of['slope']:>+17.4g}"
        lines.append(f"{title:<17}{cells}   {name.upper()} of clips from {meaning}")
    about = found["detector"]
    lines.append(f"  detector {about['file']} (sha256 {about['sha256']}), {found['features']} features")
    return "\n".join(lines)


def _distances(found: dict[str, Any]) -> list[tuple[str, str, dict[str, Any], str]]:
    """The curves of distances: name, title, curve and what clips are compared with."""
    sides = (("to_real", "", "real ones"), ("to_start", " to start", "the first clips of the same videos"))
    return [
        (name, f"{name}{title}", curve, meaning)
        for side, title, meaning in sides
        for name, curve in found[side].items()
    ]


def _motion_table(result: dict[str, Any]) -> str:
    """A row per measurement: start, end and slope of real and of generated videos; then the borders of windows."""
    real, generated = (result[side] for side in _SIDES)
    expected = "of the class asked for" if result["expected"] == "class" else "as in their own first 16 frames"
    lines = [
        f"{result['frames']} frames of {generated['videos']} generated videos and of {real['videos']} real ones",
        f"shape and color are expected {expected}",
        f"{'':<17}" + "".join(f"{side:^38}" for side in _SIDES),
        f"{'':<17}" + f"{'start':>9}{'end':>9}{'per 100 frames':>20}" * 2,
    ]
    for name, meaning in MEANING.items():
        cells = "".join(_cells(side["summary"][name]) for side in (real, generated))
        lines.append(f"{name.replace('_', ' '):<17}{cells}   {meaning}")
    borders = [side["borders"] for side in (real, generated)]
    if not result["borders"]:
        return "\n".join([*lines, "no window but the first: nothing to say of borders"])
    lines.append(f"{len(result['borders'])} borders of windows, motion in {borders[0]['frames']} frames")
    for title, of in (
        ("residual at them", lambda b: (b["at_borders"]["residual"], None)),
        ("residual inside", lambda b: (b["inside"]["residual"], None)),
        ("their ratio", lambda b: (b["residual_ratio"], b["residual_ratio_error"])),
        ("speed at them", lambda b: (b["at_borders"]["speed"], None)),
        ("speed inside", lambda b: (b["inside"]["speed"], None)),
        ("seam", lambda b: (b["seam"], b["seam_error"])),
    ):
        cells = "".join(f"{_with_error(*of(side)):>38}" for side in borders)
        meaning = "   energy of the change across borders over that elsewhere" if title == "seam" else ""
        lines.append(f"{title:<17}{cells}{meaning}")
    return "\n".join(lines)


def _cells(row: dict[str, float | None]) -> str:
    return (
        f"{_number(row['first']):>9}{_number(row['last']):>9}{_with_error(row['slope'], row['slope_error'], '+'):>20}"
    )


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    return _number(value, sign) + ("" if value is None or error is None else f" +- {error:.3f}")


def check_plots() -> None:
    """Raises ImportError if ``matplotlib`` is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need the package matplotlib: pip install 'hpdm[plots]'") from error


def plot_over_time(result: dict[str, Any], out: Path) -> None:
    """Draws every measurement along time with a band to either side.

    The band of motion, real and generated, is two standard errors; that of distances is a standard deviation over the
    draws of real clips, if there are several.

    Args:
        result: of :func:`hpdm.commands.evaluate_over_time.over_time`.
        out: the PNG to write, atomically.

    Raises:
        ImportError: ``matplotlib`` is not installed.
    """
    check_plots()
    from matplotlib.figure import Figure

    panels = _motion_panels(result) if "generated" in result else []
    if "distances" in result:
        panels += [
            (title.upper().replace("TO START", "to own start"), [("generated", 1, curve["values"], curve.get("std"))])
            for _, title, curve, _ in _distances(result["distances"])
        ]
    columns = 3 if len(panels) > 4 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for place in range(len(panels), rows * columns):
        grid.flat[place].set_axis_off()
        grid.flat[place - columns].tick_params(labelbottom=True)
    for axes, (title, curves) in zip(grid.flat, panels):
        for label, color, means, errors in curves:
            bands = [0.0] * len(means) if errors is None else [e or 0.0 for e in errors]
            points = [point for point in zip(result["times"], means, bands) if point[1] is not None]
            if not points:
                continue
            times, values, heights = zip(*points)
            axes.plot(times, values, color=f"C{color}", linewidth=1.4, label=label)
            low, high = ([v + sign * b for v, b in zip(values, heights)] for sign in (-1, 1))
            axes.fill_between(times, low, high, color=f"C{color}", alpha=0.2, linewidth=0)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel("frame", fontsize=9)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120)


_Curve = tuple[str, int, list[float | None], list[float | None] | None]
"""Label, number of the color, values, and half the height of the band."""


def _motion_panels(result: dict[str, Any]) -> list[tuple[str, list[_Curve]]]:
    """Title and curves, real and generated, of every measurement of motion."""
    panels = []
    for name in MEANING:
        curves: list[_Curve] = []
        for n, side in enumerate(_SIDES):
            errors = [None if e is None else 2 * e for e in result[side]["curve_errors"][name]]
            curves.append((side, n, result[side]["curves"][name], errors))
        panels.append((name.replace("_", " "), curves))
    return panels
