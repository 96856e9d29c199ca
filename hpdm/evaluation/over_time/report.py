"""The measurements along long videos as a table and as a plot; generated videos stand beside real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpdm.evaluation.over_time.video import MEANING
from hpdm.files import atomic_path

_SIDES = ("real", "generated")


def over_time_table(result: dict[str, Any]) -> str:
    """A row per measurement: start, end and slope of real and of generated videos; then the borders of windows.

    Args:
        result: of :func:`hpdm.evaluation.over_time.score.compare`.
    """
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
    """Draws every measurement along time, real and generated, with a band of two standard errors to either side.

    Args:
        result: of :func:`hpdm.evaluation.over_time.score.compare`.
        out: the PNG to write, atomically.

    Raises:
        ImportError: ``matplotlib`` is not installed.
    """
    check_plots()
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(MEANING) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.3 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, columns, sharex=True).flat, MEANING):
        for n, side in enumerate(_SIDES):
            means, errors = result[side]["curves"][name], result[side]["curve_errors"][name]
            points = [(t, m, 2 * (e or 0.0)) for t, m, e in zip(result["times"], means, errors) if m is not None]
            if not points:
                continue
            times, values, bands = zip(*points)
            axes.plot(times, values, color=f"C{n}", linewidth=1.4, label=side)
            low, high = ([v + sign * b for v, b in zip(values, bands)] for sign in (-1, 1))
            axes.fill_between(times, low, high, color=f"C{n}", alpha=0.2, linewidth=0)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    figure.supxlabel("frame", fontsize=9)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120)
