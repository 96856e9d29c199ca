"""What the tables of one run have in common: it is sampled in several ways, a row each, and measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from hpdm import distributed, runs
from hpdm.commands.evaluate import evaluate_run
from hpdm.commands.evaluate_options import OF_DISTRIBUTION, OF_VIDEOS, EvaluateOptions
from hpdm.commands.sampler_choice import choose_sampler
from hpdm.commands.table_settings import SAMPLES, measured_with
from hpdm.evaluation.protocols import PROTOCOLS
from hpdm.evaluation.tables import Cells, Section, sections_of, write_table


@dataclass(frozen=True)
class TableOfRun(ABC):
    """Samples one run in several ways and measures the videos."""

    out: Path
    """Folder of the table, its cells and nothing else; the same command resumes an interrupted table."""
    evaluate: Annotated[EvaluateOptions, tyro.conf.arg(name="")]
    """What to measure, as for `hpdm evaluate`. --metrics: motion, fvd, kvd or is; --samples: 512 but for motion."""

    title: ClassVar[str]
    """First line of the table."""
    published: ClassVar[Sequence[Section]] = ()
    """Sections with the paper's numbers."""

    def __post_init__(self) -> None:
        if not set(self.evaluate.metrics) <= OF_VIDEOS:
            raise ValueError(
                f"metrics: got {', '.join(self.evaluate.metrics)}, expected some of motion, fvd, kvd and is: nothing "
                "else changes from row to row"
            )
        for name in ("generated", "json"):
            if getattr(self.evaluate, name) is not None:
                raise ValueError(f"{name}: got {getattr(self.evaluate, name)}, expected none for a table")

    @abstractmethod
    def rows(self, options: EvaluateOptions, levels: int) -> Mapping[str, EvaluateOptions]:
        """How to sample and measure each row, by its name, from ``options`` for a run of ``levels`` levels."""

    def run(self) -> int:
        """Samples and measures what is not done yet, and writes the table. A collective."""
        options, metrics = self.evaluate, set(self.evaluate.metrics)
        with distributed.process_group(distributed.pick_device(options.device)) as device:
            distributed.assert_same_on_all_ranks("options", asdict(self))
            with distributed.raise_on_all_ranks():
                loaded = runs.load(options.run_folder, kernels=options.kernels, device=device, weights=options.weights)
            sampler = choose_sampler(loaded, options.sampler, overlap=PROTOCOLS[options.protocol].overlap)
            samples = options.samples or (SAMPLES if metrics & OF_DISTRIBUTION else None)
            options = replace(options, sampler=sampler, samples=samples)
            rows = self.rows(options, len(loaded.system.part_sizes(loaded.config)))
            settings, results, cells = {}, {}, Cells(self.out)
            for name, row in rows.items():
                settings[name] = measured_with(row, loaded) | {
                    "run": str(options.run_folder.resolve()),
                    "sampler": asdict(row.sampler),
                }
                results[name] = cells.get(name.replace(" ", "-"), settings[name], partial(evaluate_run, row, loaded))
            sections = [*sections_of(results), *self.published]
            title = f"{self.title}, step {loaded.step} of {options.run_folder.name}"
            text = write_table(self.out, title, sections, {"rows": settings})
            if distributed.is_first():
                print(text)
        return 0
