"""``python -m hpdm.training.plots RUN OUT.png``: plots a run's loss per pyramid level (extra ``hpdm[plots]``)."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from hpdm.files import atomic_path
from hpdm.json_file import read_json_lines
from hpdm.printable import printable


def read_log(run: Path) -> list[dict[str, float]]:
    """The rows of ``log.jsonl`` in a run's folder.

    Raises:
        FileNotFoundError: the run has no log.
        ValueError: an empty log.
    """
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"run: {path} does not exist, expected the folder that `hpdm train --out` wrote")
    rows = [
        {name: math.nan if value is None else value for name, value in row.items()}
        for _, row in read_json_lines(path, dict[str, float | None])
    ]
    if not rows:
        raise ValueError(f"run: {path} is empty")
    return rows


def running_mean(values: list[float], window: int) -> list[float]:
    """At each position, the mean of the last ``window`` values, of fewer at the start."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def plot_losses(run: Path, out: Path, window: int = 20) -> None:
    """Draws the logged losses of every level as a thin line, and as a thick one their mean over ``window`` rows.

    Validations, where the run has them, are dashed lines.

    Raises:
        ImportError: ``matplotlib`` is not installed.
        FileNotFoundError, ValueError: as :func:`read_log`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need the package matplotlib: pip install 'hpdm[plots]'") from error
    log = read_log(run)
    rows = [row for row in log if any(name.startswith("loss_") for name in row)]
    steps = [row["step"] for row in rows]
    losses = sorted(name for name in rows[0] if name.startswith("loss_"))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for n, name in enumerate(losses):
        values = [row[name] for row in rows]
        axes.plot(steps, values, color=f"C{n}", alpha=0.2, linewidth=0.6)
        axes.plot(
            steps,
            running_mean(values, window),
            color=f"C{n}",
            linewidth=1.6,
            label=name.removeprefix("loss_").replace("_", " "),
        )
        held_out = name.replace("loss_", "validation_", 1)
        validated = [(row["step"], row[held_out]) for row in log if held_out in row]
        if validated:
            axes.plot(*zip(*validated), color=f"C{n}", linewidth=1.6, linestyle="--", marker=".", label="held out")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="training losses")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m hpdm.training.plots RUN OUT.png")
    try:
        plot_losses(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(printable(f"error: {error}"))
