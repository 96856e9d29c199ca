"""A chart of the bytes that a training step moves, by what for, from results of ``hpdm plan --json``.

hpdm plan --preset hpdm_m --optimizer lamb --kernels triton --recompute none --json now.json
python -m benchmarks.moved "0.2=before.json" "now=now.json" --save docs/moved.png

Each file gives one bar, of its first setting; a file that an earlier version wrote serves as well.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpdm.files import atomic_path

COLORS = ("#2c6fa6", "#3d5a80", "#2a9d8f", "#e9c46a", "#e67e22", "#8e44ad", "#c0392b", "#8a97a6")
LEAST_TOLD = 0.02
"""Share of the longest bar from which on a part has its number written into it."""


def bar(path: Path) -> dict[str, float]:
    """GB by group of the first setting of a plan.

    Raises:
        ValueError: the file is no plan with counts by group.
    """
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))["training"][0]["moved_by_group"]
        return {group: moved / 1e9 for group, moved in groups.items()}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: got no plan with moved_by_group, expected a result of hpdm plan --json") from error


def chart(bars: dict[str, dict[str, float]]) -> Any:
    """The figure: a horizontal bar for each label, its groups one after the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.1 + 0.55 * len(bars)), layout="constrained")
    axes = figure.subplots()
    longest = max(sum(groups.values()) for groups in bars.values())
    names = list(dict.fromkeys(group for groups in bars.values() for group in groups))
    left = dict.fromkeys(bars, 0.0)
    for name, color in zip(names, COLORS):
        for label, groups in bars.items():
            gb = groups.get(name, 0.0)
            axes.barh(label, gb, left=left[label], color=color, label=name if label == next(iter(bars)) else None)
            if gb >= LEAST_TOLD * longest:
                axes.text(left[label] + gb / 2, label, f"{gb:.1f}", ha="center", va="center", color="white", size=8)
            left[label] += gb
    for label, total in left.items():
        axes.text(total + 0.01 * longest, label, f"{total:.1f} GB", va="center", size=9, weight="bold")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.set_xlabel("GB moved in a training step, every operation's inputs and results once")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moved", description="chart of bytes by group")
    parser.add_argument("plans", nargs="+", metavar="LABEL=FILE", help="results of hpdm plan --json")
    parser.add_argument("--save", type=Path, required=True, metavar="FILE", help="the picture, PNG")
    options = parser.parse_args(arguments)
    try:
        pairs = [plan.partition("=") for plan in options.plans]
        if any(not sign for _, sign, _ in pairs):
            raise ValueError(f"plans: got {options.plans}, expected LABEL=FILE each")
        figure = chart({label: bar(Path(file)) for label, _, file in pairs})
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with atomic_path(options.save) as path:
        figure.savefig(path, dpi=110, format="png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
