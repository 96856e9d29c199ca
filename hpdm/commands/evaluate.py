"""``hpdm evaluate``: measures the quality of a run. The metrics are in :mod:`hpdm.evaluation`.

Under ``torchrun`` the ranks share the clips, and rank 0 reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from hpdm import distributed, runs
from hpdm.checks import at_least
from hpdm.commands.common import Kernels, clips_of_run
from hpdm.data.clips import VideoDataset
from hpdm.data.layout import Split, find_split_file
from hpdm.evaluation.denoising import denoising_table, evaluate_denoising
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import (
    CLASSIFIER_FRAMES,
    PROTOCOLS,
    SPLITS,
    ProtocolName,
    RealFeatures,
    distribution_lines,
    draw_labels,
    evaluate_distribution,
)
from hpdm.evaluation.generated import class_of_file, find_generated, read_generated, sample_clips
from hpdm.evaluation.motion import evaluate_motion, motion_table, read_synthetic_set
from hpdm.evaluation.real_statistics import real_statistics
from hpdm.files import write_json
from hpdm.runs import Run
from hpdm.sampling import SamplerOptions
from hpdm.text import EmbeddingStore

Metric = Literal["denoising", "motion", "fvd", "is"]

MOTION_SAMPLES = 96


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run: its denoising error on clips, or the quality of its samples."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints."""
    data: Path
    """Folder of videos."""
    metrics: tuple[Metric, ...] = ("denoising",)
    """denoising: error of v per level and noise level. motion: motion, shape, color and texture of sampled clips of
    the synthetic set, next to real ones. fvd, is: Frechet video distance and Inception score of samples."""
    split: Split | None = None
    """Use UCF-101's official split; fvd requires it where there is one (published: train)."""
    clips: int = 64
    """Denoising: number of clips, evenly spread over the set."""
    embeddings: Path | None = None
    """Denoising of a run with text: folder of the captions' embeddings, written by `hpdm data embed`."""
    bins: int = 4
    """Denoising: number of ranges of the diffusion time, from clean to noise."""
    samples: int | None = None
    """Number of videos to sample. Default: the protocol's for fvd and is, 96 for motion. Motion takes the classes in
    turn and measures as many real clips."""
    generated: Path | None = None
    """Folder of videos that `hpdm sample` wrote, to measure instead of sampling new ones."""
    protocol: ProtocolName = "paper"
    """fvd, is: number of videos. paper: all real and 10,000 sampled ones; stylegan-v: 2,048 of each."""
    frames: int = 16
    """fvd, is: frames per video; of a sampled video the first ones."""
    detector: Path | None = None
    """fvd: TorchScript file of I3D, with the signature of StyleGAN-V's export."""
    classifier: Path | None = None
    """is: TorchScript file of C3D that returns probabilities."""
    statistics: Path | None = None
    """fvd: folder that keeps the feature statistics of real clips for the next evaluation."""
    sampler: Annotated[SamplerOptions, tyro.conf.arg(name="")] = field(default_factory=SamplerOptions)
    """How to sample."""
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
        at_least(self, 1, "clips", "bins", "samples", "batch", "frames")
        at_least(self, 0, "seed")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: got {list(self.metrics)}, expected one or more different ones")
        for metric, name in (("fvd", "detector"), ("is", "classifier")):
            if metric in self.metrics and getattr(self, name) is None:
                raise ValueError(f"{name}: got none, expected a TorchScript file for {metric}; none is downloaded")
        if "fvd" in self.metrics and self.videos == 1:
            raise ValueError("samples: got 1, expected at least 2 for fvd")
        if "is" in self.metrics and (self.videos < SPLITS or self.frames > CLASSIFIER_FRAMES):
            raise ValueError(
                f"metrics: got is with {self.videos} samples of {self.frames} frames, expected at least {SPLITS} of at "
                f"most {CLASSIFIER_FRAMES}: the score has {SPLITS} splits and C3D takes {CLASSIFIER_FRAMES} frames"
            )
        if self.json is not None and not self.json.parent.is_dir():
            raise FileNotFoundError(f"json: folder {self.json.parent} does not exist")

    @property
    def videos(self) -> int:
        """Generated videos for fvd and is."""
        return PROTOCOLS[self.protocol].generated if self.samples is None else self.samples


def run(options: EvaluateOptions) -> int:
    """The command ``hpdm evaluate``; returns the exit status."""
    with distributed.process_group(distributed.pick_device(options.device)):
        result = evaluate(options)
        if distributed.is_first():
            print("\n".join(report_lines(options, result)))
            if options.json is not None:
                write_json(options.json, result)
    return 0


def report_lines(options: EvaluateOptions, result: dict[str, Any]) -> list[str]:
    """The result of :func:`evaluate` as lines for a terminal."""
    split = options.split or "none"
    lines = [f"step {result['step']} of {options.run_folder} ({options.weights}), {options.data}, split {split}"]
    if "denoising" in options.metrics:
        lines += [f"mean squared error of v, {result['clips']} clips", denoising_table(result)]
    if "motion" in options.metrics:
        lines.append(motion_table(result["motion"]))
    if "distribution" in result:
        distribution = result["distribution"]
        lines += [
            distribution_lines(distribution),
            f"  protocol {options.protocol}, first {distribution['frames']} of {distribution['frames_generated']} "
            f"frames at {'x'.join(map(str, distribution['size']))}, seed {options.seed}",
        ]
    return lines


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs the evaluation. A collective: every rank calls it and gets the same result.

    Returns:
        ``step``; with the metric denoising what :func:`hpdm.evaluation.denoising.evaluate_denoising` returns; with
        motion ``motion``, see :func:`hpdm.evaluation.motion.evaluate_motion`; with fvd or is ``distribution``, see
        :func:`hpdm.evaluation.distribution.evaluate_distribution`.

    Raises:
        FileNotFoundError: no such run, data, split or detector.
        ValueError: the data has other classes than the run, or something that a metric needs is missing.
        RuntimeError: another rank failed before the work began.
    """
    with distributed.process_group(distributed.pick_device(options.device)) as device:
        distributed.assert_same_on_all_ranks("options", asdict(options))
        with distributed.raise_on_all_ranks():
            loaded = runs.load(options.run_folder, kernels=options.kernels, device=device, weights=options.weights)
            _check(options, loaded)
        result: dict[str, Any] = {"step": loaded.step}
        if "denoising" in options.metrics:
            result |= _denoising(options, loaded)
        if "motion" in options.metrics:
            result["motion"] = _motion(options, loaded)
        if {"fvd", "is"} & set(options.metrics):
            result["distribution"] = _distribution(options, loaded)
        return result


def _clips(options: EvaluateOptions, loaded: Run, **changes: Any) -> VideoDataset:
    return clips_of_run(loaded, options.data, options.split, argument="data", **changes)


def _check(options: EvaluateOptions, loaded: Run) -> None:
    """Checks run and data before the long work begins; raises as :func:`evaluate`."""
    kind, metrics, frames = loaded.config.conditioning, set(options.metrics), loaded.config.resolution[0]
    dataset = _clips(options, loaded)
    if "denoising" in metrics and (kind == "text") != (options.embeddings is not None):
        expected = "the folder that `hpdm data embed` wrote" if kind == "text" else "none"
        raise ValueError(
            f"embeddings: got {options.embeddings or 'none'}, expected {expected} for conditioning={kind!r}"
        )
    if metrics & {"motion", "fvd", "is"} and options.generated is None and kind == "text":
        raise ValueError(
            "run: it is conditioned on text, expected --generated, a folder of videos that `hpdm sample --prompts` "
            "wrote"
        )
    if "motion" in metrics:
        read_synthetic_set(dataset)
        if kind != "class":
            raise ValueError(f"run: got a run with conditioning {kind!r}, expected 'class' for motion")
    if metrics & {"fvd", "is"} and options.frames > frames:
        raise ValueError(f"frames: got {options.frames}, expected at most {frames}, the frames of the run")
    if "fvd" in metrics and options.split is None and _has_split(dataset):
        raise ValueError(f"split: got none, but {options.data} has split lists: expected train (published) or test")


def _has_split(dataset: VideoDataset) -> bool:
    try:
        find_split_file(dataset.root, "train", 1)
    except FileNotFoundError:
        return False
    return True


def _denoising(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """The metric denoising."""
    store = None
    if options.embeddings is not None:
        store = EmbeddingStore(options.embeddings, loaded.config.text_width)
    return evaluate_denoising(
        loaded,
        _clips(options, loaded, captions=store is not None),
        clips=options.clips,
        bins=options.bins,
        batch=options.batch,
        seed=options.seed,
        embeddings=store,
    )


def _motion(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """The metric motion, with the origin of the videos."""
    dataset, names = _clips(options, loaded), loaded.classes
    frames, height, width = loaded.config.resolution
    if options.generated is not None:
        files = find_generated(options.generated, options.samples)
        expected = [class_of_file(path, names) for path in files]
        videos = read_generated(files, frames, (height, width))
    else:
        labels = [i % len(names) for i in range(options.samples or MOTION_SAMPLES)]
        expected = [names[label] for label in labels]
        videos = _sample(options, loaded, labels, len(labels))
    return evaluate_motion(dataset, videos, expected, real=len(expected)) | {"origin": _origin(options)}


def _distribution(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """The metrics fvd and is, with everything that they depend on."""
    frames, height, width = loaded.config.resolution
    metrics, device = options.metrics, loaded.device
    detector = None if options.detector is None else Detector(options.detector, "features", device)
    classifier = None if options.classifier is None else Detector(options.classifier, "classes", device)
    windows = _clips(options, loaded, frames=options.frames, train=True, short="skip", seed=options.seed)
    if options.generated is not None:
        files = find_generated(options.generated, options.videos)
        videos = read_generated(files, options.frames, (height, width))
    else:
        classes = windows.labels if loaded.config.conditioning == "class" else None
        videos = _sample(options, loaded, draw_labels(classes, options.videos, options.seed), options.videos)
    real = None
    if "fvd" in metrics and detector is not None:
        count = PROTOCOLS[options.protocol].real
        statistics = real_statistics(windows, detector, count=count, batch=options.batch, folder=options.statistics)
        real = RealFeatures(detector, statistics)
    scores = evaluate_distribution(
        videos,
        frames=options.frames,
        batch=options.batch,
        real=real,
        classifier=classifier if "is" in metrics else None,
    )
    return scores | {
        "protocol": options.protocol,
        "split": options.split,
        "size": [height, width],
        "frames_generated": frames,
        "stride": windows.stride,
        "fps": windows.fps,
        "seed": options.seed,
        "weights": options.weights,
        "origin": _origin(options),
    }


def _sample(
    options: EvaluateOptions, loaded: Run, labels: list[int] | None, count: int
) -> Iterator[tuple[int, Tensor]]:
    sampler = loaded.system.sampler(loaded.model, options.sampler)
    return sample_clips(sampler, options.seed, labels, count, options.batch)


def _origin(options: EvaluateOptions) -> dict[str, Any]:
    """Where the generated videos come from: a folder, or how they were sampled."""
    if options.generated is not None:
        return {"generated": str(options.generated)}
    return {"first_seed": options.seed, "sampler": asdict(options.sampler)}
