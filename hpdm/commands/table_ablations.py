"""``hpdm table ablations``: the same training with parts of the model left out or changed (the paper's Table 3)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro
from torch import nn

from hpdm import distributed, runs
from hpdm.checks import check_choice
from hpdm.commands.evaluate import check_run, evaluate_run
from hpdm.commands.evaluate_options import DISTANCES, OF_DISTRIBUTION, OF_VIDEOS, EvaluateOptions, Metric
from hpdm.commands.sampler_choice import choose_sampler, sampler_not_given
from hpdm.commands.table_settings import SAMPLES, measured_with
from hpdm.commands.train import prepare, train
from hpdm.data.layout import Split
from hpdm.data.mixture import parse_root
from hpdm.evaluation.protocols import PROTOCOLS, ProtocolName
from hpdm.evaluation.tables import Cells, Section, sections_of, write_table
from hpdm.json_file import read_json_lines
from hpdm.objective import Objective
from hpdm.recipe import Recipe
from hpdm.runs import Run
from hpdm.sampling import SamplerOptions
from hpdm.training.options import TrainOptions

SetupName = Literal["shallow", "detached", "no-adaptive", "no-coordinates", "default", "sinusoidal", "shared"]


class Setup(NamedTuple):
    """A row of the table."""

    title: str
    changes: dict[str, Any]
    """Fields of :class:`hpdm.system.Architecture`."""
    published: tuple[float, float, float, float] | None
    """Table 3: FVD@512 on UCF-101 at 16x64x64, 32x128x128 and 64x256x256, and training videos/s on one A100."""


SETUPS: dict[SetupName, Setup] = {
    "shallow": Setup("shallow fusion", {"fusion": "shallow"}, (298.9, 411.9, 467.0, 4.91)),
    "detached": Setup("context detached", {"detach_context": True}, (290.6, 375.0, 397.3, 4.4)),
    "no-adaptive": Setup("no adaptive computation", {"adaptive": False}, (319.3, 391.5, 373.9, 2.73)),
    "no-coordinates": Setup("no coordinates", {"coordinates": False}, (305.3, 400.7, 389.5, 4.47)),
    "default": Setup("default", {}, (287.6, 376.6, 378.2, 4.4)),
    # Appendix D: both "led to inferior results" or diverged, without numbers.
    "sinusoidal": Setup("sinusoidal coordinates (D.2)", {"coordinate_embedding": "sinusoidal"}, None),
    "shared": Setup("shared blocks (D.4)", {"share_blocks": True}, None),
}
"""Table 3 and two failed experiments of appendix D."""

TABLE_3: tuple[SetupName, ...] = tuple(name for name, setup in SETUPS.items() if setup.published is not None)


@dataclass(frozen=True)
class AblationTable:
    """Table 3: train a model with one part left out at a time, and measure all of them. --out is the table's folder."""

    train: Annotated[TrainOptions, tyro.conf.arg(name="")]
    """How to train each of them, as for `hpdm train`; the runs are in OUT/runs."""
    setups: tuple[SetupName, ...] = TABLE_3
    """Rows of the table: those of Table 3, and sinusoidal and shared of appendix D."""
    metrics: tuple[Metric, ...] = ("denoising",)
    """What to measure, as for `hpdm evaluate`: denoising, motion, fvd, kvd or is, on every level."""
    measured_data: Path | None = None
    """Folder of the clips to measure with. Default: that of --data."""
    measured_split: Split | None = None
    """Their side of the split. Default: none with --measured-data; else, where --split is given, train for fvd
    and kvd (published) and test for all other metrics."""
    clips: int = 64
    """Denoising: number of clips."""
    samples: int | None = None
    """Number of videos to sample: 512 for fvd, kvd and is, 96 for motion."""
    protocol: ProtocolName = "paper"
    """fvd, kvd: real videos and draws of them, and the overlap of tiles unless --sampler.overlap is given."""
    frames: int = 16
    """fvd, kvd, is: frames per video."""
    detector: Path | None = None
    """fvd, kvd: TorchScript file of I3D."""
    classifier: Path | None = None
    """is: TorchScript file of C3D."""
    statistics: Path | None = None
    """fvd, kvd: folder that keeps the features of real clips."""
    sampler: SamplerOptions = field(default_factory=sampler_not_given)
    """How to sample."""
    measured_batch: int = 16
    """Clips at a time when measuring."""

    def __post_init__(self) -> None:
        for name in self.setups:
            check_choice("setups", name, SetupName)
        if not self.setups or len(set(self.setups)) < len(self.setups):
            got = list(self.setups)
            raise ValueError(f"setups: got {got}, expected some different ones of {', '.join(get_args(SetupName))}")
        for setup in SETUPS.values():
            self._check_default(setup)
        if self.measured_data is None and len(self.train.data) > 1:
            raise ValueError(f"measured_data: got none with {len(self.train.data)} sets in --data, expected a folder")
        self._evaluation("default")  # raises for options of the metrics that do not fit

    def _check_default(self, setup: Setup) -> None:
        """Raises ValueError if a field that the table varies is given."""
        for name in setup.changes:
            value, default = getattr(self.train.architecture, name), getattr(type(self.train.architecture)(), name)
            if value != default:
                raise ValueError(f"{name}: got {value}, expected {default}: the table has a row for it")

    def run(self) -> int:
        """Trains and measures what is not done yet, and writes the table."""
        out, results, speeds = self.train.out, {}, {}
        with distributed.process_group(distributed.pick_device(self.train.device)) as device:
            distributed.assert_same_on_all_ranks("options", asdict(self))
            self._check()
            cells = Cells(out)
            common: dict[str, Any] = {}
            for name in self.setups:
                setup, folder = SETUPS[name], self._folder(name)
                train(self._training(name))  # a run that is finished is found again, and compared with the options
                loaded = runs.load(folder, kernels=self.train.kernels, device=device)
                options = self._evaluation(name)
                if OF_VIDEOS & set(self.metrics):
                    options = replace(options, level=tuple(range(len(loaded.system.part_sizes(loaded.config)))))
                sampler = choose_sampler(loaded, self.sampler, overlap=PROTOCOLS[self.protocol].overlap)
                options = replace(options, sampler=sampler)
                common = measured_with(options, loaded) | {"sampler": asdict(sampler)}
                settings = common | {"model": loaded.config.to_dict(), "training": _training_of(loaded)}
                results[setup.title] = cells.get(name, settings, partial(evaluate_run, options, loaded))
                speeds[setup.title] = _clips_per_s(folder)
            sections = sections_of(results)
            sections.append(_speed_section(speeds, str(device)))
            published = {SETUPS[name].title: values for name in self.setups if (values := SETUPS[name].published)}
            if published:
                columns = ("16x64x64", "32x128x128", "64x256x256", "training videos/s, one A100")
                sections.append(Section("Published: FVD@512, UCF-101", columns, published))
            title = f"Ablations (Table 3), {self.train.preset}, step {loaded.step}"
            text = write_table(out, title, sections, common | {"training": _training_of(loaded)})
            if distributed.is_first():
                print(text)
        return 0

    def _check(self) -> None:
        """Checks the models, the data and the measurement before the first run is trained. A collective."""
        jobs = [prepare(self._training(name)) for name in self.setups]
        job = jobs[0]
        classes = job.dataset.class_names if job.config.conditioning == "class" else []
        untrained = Run(nn.Identity(), job.config, classes, job.options.as_json(job.recipe), 0, job.system)
        with distributed.raise_on_all_ranks():
            check_run(self._evaluation(self.setups[0]), untrained)

    def _training(self, name: SetupName) -> TrainOptions:
        """How to train a run."""
        architecture = replace(self.train.architecture, **SETUPS[name].changes)
        return replace(self.train, out=self._folder(name), architecture=architecture)

    def _folder(self, name: SetupName) -> Path:
        return self.train.out / "runs" / name

    def _evaluation(self, name: SetupName) -> EvaluateOptions:
        """How to measure a run."""
        split, samples = self.measured_split, self.samples
        if split is None and self.measured_data is None and self.train.split is not None:
            split = "train" if set(DISTANCES) & set(self.metrics) else "test"
        if samples is None and OF_DISTRIBUTION & set(self.metrics):
            samples = SAMPLES
        return EvaluateOptions(
            run_folder=self._folder(name),
            data=self.measured_data or parse_root(self.train.data[0]).root,
            metrics=self.metrics,
            split=split,
            clips=self.clips,
            embeddings=self.train.embeddings if "denoising" in self.metrics else None,
            samples=samples,
            protocol=self.protocol,
            frames=self.frames,
            detector=self.detector,
            classifier=self.classifier,
            statistics=self.statistics,
            sampler=self.sampler,
            batch=self.measured_batch,
            seed=self.train.seed,
            kernels=self.train.kernels,
            device=self.train.device,
        )


_OF_THE_TRAINING = {f.name for kind in (Recipe, Objective) for f in fields(kind)} - {"parallel"} | {"seed"}
"""Options of training that a table names; `train` has compared the others with those of the run."""


def _training_of(loaded: Run) -> dict[str, Any]:
    return {name: value for name, value in loaded.training.items() if name in _OF_THE_TRAINING}


def _clips_per_s(run: Path) -> float | None:
    """Median training speed of the rows of a run's log."""
    path = run / "log.jsonl"
    if not path.is_file():
        return None
    rows = (row for _, row in read_json_lines(path, dict[str, float | None]))
    speeds = [speed for row in rows if (speed := row.get("clips_per_s")) is not None]
    return median(speeds) if speeds else None


def _speed_section(speeds: dict[str, float | None], device: str) -> Section:
    title = f"training speed on {device}, {distributed.world_size()} process(es)"
    return Section(title, ("clips/s",), {name: (speed,) for name, speed in speeds.items()})
