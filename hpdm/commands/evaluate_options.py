"""The options of ``hpdm evaluate``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hpdm.checks import at_least
from hpdm.commands.common import Kernels, clips_of_run
from hpdm.commands.over_time_options import OverTimeOptions
from hpdm.commands.reconstruction_options import ReconstructionOptions
from hpdm.commands.sampler_choice import sampler_not_given
from hpdm.data.clips import VideoDataset
from hpdm.data.layout import Split
from hpdm.evaluation.distribution import CLASSIFIER_FRAMES, SPLITS
from hpdm.evaluation.feature_distances import Distance
from hpdm.evaluation.protocols import PROTOCOLS, ProtocolName
from hpdm.objective import Context
from hpdm.runs import Run
from hpdm.sampling import SamplerOptions

Metric = Literal["denoising", "motion", "fvd", "kvd", "is", "reconstruction"]

DISTANCES: tuple[Distance, ...] = ("fvd", "kvd")
"""The metrics that compare videos with real ones by the features of a detector."""
OF_DISTRIBUTION: set[Metric] = {"fvd", "kvd", "is"}
"""The metrics that need a learned network."""
OF_VIDEOS: set[Metric] = {"motion", *OF_DISTRIBUTION}
"""The metrics of sampled videos."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run: its denoising error on clips, or the quality of its samples."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints."""
    data: Path
    """Folder of videos."""
    metrics: tuple[Metric, ...] = ("denoising",)
    """denoising: error of v per level and noise level. motion: motion, shape, color and texture of sampled clips of
    the synthetic set, next to real ones. fvd, kvd, is: Frechet and kernel video distance and Inception score of
    samples.
    reconstruction: PSNR of clips that an autoencoder has encoded and decoded, next to that of averages over blocks."""
    split: Split | None = None
    """Use UCF-101's official split; fvd and kvd require it where there is one (published: train), but with the
    protocol lvdm (published: none, the whole set)."""
    clips: int = 64
    """Denoising, reconstruction: number of clips, evenly spread over the set."""
    embeddings: Path | None = None
    """Denoising of a run with text: folder of the captions' embeddings, written by `hpdm data embed`."""
    bins: int = 4
    """Denoising: number of ranges of the diffusion time, from clean to noise."""
    context: Context = "clean"
    """Denoising: noise of the levels below the one that is measured: "clean", none, as when sampling; "same", in the
    same range; "independent", any, as in training."""
    samples: int | None = None
    """Number of videos to sample. Default: the protocol's for fvd, kvd and is, 96 for motion; along time 512 for fvd
    and kvd, 24 for motion. Motion alone takes the classes in turn, and measures as many real clips."""
    generated: Path | None = None
    """Folder of videos that `hpdm sample` wrote, to measure instead of sampling new ones."""
    level: tuple[int, ...] = ()
    """Levels at which videos are measured, e.g. 0 1 2, all from one sampling run (or from the files that `hpdm sample
    --save-levels` wrote); real clips are brought to their sizes. Default: the last level alone."""
    given_levels: int = 0
    """Number of levels, from 0 up, that are not sampled but those of real clips of --data, so that the levels above are
    judged alone."""
    protocol: ProtocolName = "paper"
    """fvd, kvd, is: number of videos, and how tiles overlap unless --overlap is given. paper: all real and 10,000
    sampled ones, overlap hw; stylegan-v: 2,048 of each; lvdm: 2,048 of each, ten draws of the real clips."""
    real_clips: int | None = None
    """fvd, kvd: number of real clips of a draw. Default: the protocol's, 512 along time."""
    draws: int | None = None
    """fvd, kvd: how often the real clips are drawn; mean and standard deviation are reported. The sampled videos are
    the same for all draws. Default: the protocol's, 1 along time."""
    over_time: Annotated[OverTimeOptions, tyro.conf.arg(name="")] = field(default_factory=OverTimeOptions)
    """Motion, fvd and kvd along long videos."""
    reconstruction: Annotated[ReconstructionOptions, tyro.conf.arg(name="")] = field(
        default_factory=ReconstructionOptions
    )
    """Reconstruction by an autoencoder."""
    frames: int = 16
    """fvd, kvd, is: frames per video; of a sampled video the first ones, and all of a level that has no more."""
    detector: Path | None = None
    """fvd, kvd: TorchScript file of I3D, with the signature of StyleGAN-V's export."""
    classifier: Path | None = None
    """is: TorchScript file of C3D that returns probabilities."""
    statistics: Path | None = None
    """fvd, kvd: folder that keeps the features of real clips for the next evaluation, and along time also those of the
    clips of --generated, each video as it is done."""
    sampler: Annotated[SamplerOptions, tyro.conf.arg(name="")] = field(default_factory=sampler_not_given)
    """How to sample. Where it is not given, the overlap is the protocol's."""
    batch: int = 16
    """Clips at a time."""
    seed: int = 0
    """Seed of noise, windows of real clips, classes and the first sampled video; the next take the next seeds."""
    kernels: Kernels = "auto"
    """Backend of every op; "reference" is the paper's formulas without our kernels."""
    weights: str = "ema"
    """Weights of the run: "ema" is their (first) moving average, "ema-0.10" that of a relative width, if the run has
    several, "model" those of the last step."""
    json: Path | None = None
    """Also write the result to this file."""
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "clips", "bins", "samples", "batch", "frames", "draws")
        at_least(self, 2, "real_clips")
        at_least(self, 0, "seed", "given_levels")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: got {list(self.metrics)}, expected one or more different ones")
        for metric, name in (("fvd", "detector"), ("kvd", "detector"), ("is", "classifier")):
            if metric in self.metrics and getattr(self, name) is None:
                raise ValueError(f"{name}: got none, expected a TorchScript file for {metric}; none is downloaded")
        if self.distances and self.samples == 1:
            raise ValueError(f"samples: got 1, expected at least 2 for {self.distances[0]}")
        for name, number in (("real_clips", self.real_clips), ("draws", self.draws)):
            if number is not None and not self.distances:
                raise ValueError(f"{name}: got {number} without a distance from real clips, expected fvd or kvd")
        if "is" in self.metrics and (self.videos < SPLITS or self.frames > CLASSIFIER_FRAMES):
            raise ValueError(
                f"metrics: got is with {self.videos} samples of {self.frames} frames, expected at least {SPLITS} of at "
                f"most {CLASSIFIER_FRAMES}: the score has {SPLITS} splits and C3D takes {CLASSIFIER_FRAMES} frames"
            )
        for name, value in (("level", self.level), ("given_levels", self.given_levels)):
            if value and not OF_VIDEOS & set(self.metrics):
                raise ValueError(f"{name}: got {value} without a metric of videos, expected motion, fvd, kvd or is")
        if self.over_time.frames is not None:
            if "motion" not in self.metrics and not self.distances:
                raise ValueError(
                    f"over_time: got {self.over_time.frames} without the metric motion, fvd or kvd, expected one"
                )
            if self.level or self.given_levels:
                name = "level" if self.level else "given_levels"
                raise ValueError(f"{name}: got {getattr(self, name)} with over_time, expected none: videos are whole")
        if "reconstruction" not in self.metrics:
            for name, value in vars(self.reconstruction).items():
                if value is not None:
                    raise ValueError(f"{name}: got {value} without the metric reconstruction, expected it")
        if len(set(self.level)) < len(self.level):
            raise ValueError(f"level: got {list(self.level)}, expected different ones")
        if self.given_levels and self.generated is not None:
            raise ValueError(f"given_levels: got {self.given_levels} with --generated, expected videos to sample")
        if self.level and min(self.level) < self.given_levels:
            raise ValueError(
                f"level: got {min(self.level)}, expected at least given_levels = {self.given_levels}, the first level "
                "that is sampled"
            )
        if self.json is not None and not self.json.parent.is_dir():
            raise FileNotFoundError(f"json: folder {self.json.parent} does not exist")

    @property
    def videos(self) -> int:
        """Generated videos for fvd, kvd and is."""
        return PROTOCOLS[self.protocol].generated if self.samples is None else self.samples

    @property
    def distances(self) -> tuple[Distance, ...]:
        """The distances from real clips that are measured."""
        return tuple(name for name in DISTANCES if name in self.metrics)

    @property
    def of_clips(self) -> set[Metric]:
        """The metrics of :data:`OF_DISTRIBUTION` that are measured on clips, not along time."""
        along_time = set(DISTANCES) if self.over_time.frames is not None else set[Distance]()
        return (OF_DISTRIBUTION & set(self.metrics)) - along_time

    def open_clips(self, loaded: Run, **changes: Any) -> VideoDataset:
        """The clips of ``data``, as :func:`hpdm.commands.common.clips_of_run` reads them."""
        return clips_of_run(loaded, self.data, self.split, argument="data", **changes)
