"""``hpdm table overlap``: one run, sampled with every overlap of tiles (the paper's Table 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.sampler_choice import NotGiven
from hpdm.commands.table_of_run import TableOfRun
from hpdm.evaluation.tables import Section

PUBLISHED = {
    "none": (385.40, 475.05),
    "w": (367.10, 452.79),
    "h": (383.15, 467.36),
    "hw": (382.25, 456.10),
    "f": (380.63, 460.74),
    "fw": (398.77, 492.84),
    "fh": (360.46, 436.81),
    "fhw": (381.85, 467.37),
}
"""Table 4: FVD@512 on UCF-101 at 32x128x128 and 64x256x256, by the axes on which tiles overlap."""


@dataclass(frozen=True)
class OverlapTable(TableOfRun):
    """Table 4: sample one run with each of the eight overlaps of tiles, and measure every level above the first."""

    title = "Overlap of tiles (Table 4)"
    published = (Section("Published: FVD@512, UCF-101", ("32x128x128", "64x256x256"), PUBLISHED),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.evaluate.sampler.overlap, NotGiven):
            raise ValueError(f"overlap: got {self.evaluate.sampler.overlap}, expected none: the table has all eight")

    def rows(self, options: EvaluateOptions, levels: int) -> Mapping[str, EvaluateOptions]:
        level = options.level or tuple(range(max(1, options.given_levels), levels))
        if not level:
            raise ValueError(f"run: got a run of {levels} level, expected at least 2: its first level has no tiles")
        return {
            overlap: replace(options, level=level, sampler=replace(options.sampler, overlap=overlap))
            for overlap in PUBLISHED
        }
