"""``hpdm table ladder``: one run, with ever more levels taken from real clips, so that each level is judged alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.table_of_run import TableOfRun


@dataclass(frozen=True)
class LadderTable(TableOfRun):
    """Sample one run with none, one, two ... levels taken from real clips, and measure those that it sampled."""

    title = "Levels given and sampled"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("given_levels", "level"):
            if getattr(self.evaluate, name):
                raise ValueError(f"{name}: got {getattr(self.evaluate, name)}, expected none: the table has all")

    def rows(self, options: EvaluateOptions, levels: int) -> Mapping[str, EvaluateOptions]:
        return {
            f"{given} given": replace(options, given_levels=given, level=tuple(range(given, levels)))
            for given in range(levels)
        }
