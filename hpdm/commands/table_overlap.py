"""``hpdm table overlap``: one run, sampled with every overlap of tiles (the paper's Table 4)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from hpdm import distributed, runs
from hpdm.commands.common import NotGiven, choose_sampler
from hpdm.commands.evaluate import evaluate_run
from hpdm.commands.evaluate_options import OF_VIDEOS, EvaluateOptions
from hpdm.commands.table_settings import measured_with
from hpdm.evaluation.tables import Cells, Section, sections_of, write_table

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

SAMPLES = 512
"""FVD@512."""


@dataclass(frozen=True)
class OverlapTable:
    """Table 4: sample one run with each of the eight overlaps of tiles, and measure every level above the first."""

    out: Path
    """Folder of the table, its cells and nothing else; the same command resumes an interrupted table."""
    evaluate: Annotated[EvaluateOptions, tyro.conf.arg(name="")]
    """What to measure, as for `hpdm evaluate`. --metrics: motion, fvd or is; --samples: 512 for fvd and is."""

    def __post_init__(self) -> None:
        metrics = set(self.evaluate.metrics)
        if not metrics <= OF_VIDEOS:
            raise ValueError(
                f"metrics: got {', '.join(self.evaluate.metrics)}, expected some of motion, fvd and is: the overlap "
                "changes nothing else"
            )
        for name in ("generated", "json"):
            if getattr(self.evaluate, name) is not None:
                raise ValueError(f"{name}: got {getattr(self.evaluate, name)}, expected none for a table")
        if not isinstance(self.evaluate.sampler.overlap, NotGiven):
            raise ValueError(f"overlap: got {self.evaluate.sampler.overlap}, expected none: the table has all eight")

    def run(self) -> int:
        """Samples and measures what is not done yet, and writes the table."""
        options = self.evaluate
        with distributed.process_group(distributed.pick_device(options.device)) as device:
            distributed.assert_same_on_all_ranks("options", asdict(self))
            with distributed.raise_on_all_ranks():
                loaded = runs.load(options.run_folder, kernels=options.kernels, device=device, weights=options.weights)
            count = len(loaded.system.part_sizes(loaded.config))
            levels = options.level or tuple(range(max(1, options.given_levels), count))
            samples = options.samples or (SAMPLES if {"fvd", "is"} & set(options.metrics) else None)
            options = replace(options, level=levels, samples=samples)
            common = measured_with(options, loaded) | {"run": str(options.run_folder.resolve())}
            sampler, cells, results = choose_sampler(loaded, options.sampler), Cells(self.out), {}
            for overlap in PUBLISHED:
                row = replace(options, sampler=replace(sampler, overlap=overlap))
                settings = common | {"sampler": asdict(row.sampler)}
                results[overlap] = cells.get(f"overlap-{overlap}", settings, partial(evaluate_run, row, loaded))
            sections: list[Section] = sections_of(results)
            sections.append(Section("Published: FVD@512, UCF-101", ("32x128x128", "64x256x256"), PUBLISHED))
            title = f"Overlap of tiles (Table 4), step {loaded.step}"
            text = write_table(self.out, title, sections, common | {"sampler": asdict(sampler)})
            if distributed.is_first():
                print(text)
        return 0
