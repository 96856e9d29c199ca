"""``hpdm evaluate``: how good a run is. What is measured, and how, is in the modules beside this one.

Started by ``torchrun`` the processes share the clips out; the first one reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.data.layout import find_split_file
from hpdm.distributed import pick_device
from hpdm.evaluation.denoising import denoising_table, evaluate_denoising
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import (
    CLASSIFIER_FRAMES,
    PROTOCOLS,
    SPLITS,
    ProtocolName,
    distribution_lines,
    draw_labels,
    evaluate_distribution,
    real_statistics,
)
from hpdm.evaluation.generated import class_of_file, find_generated, read_generated, sample_clips
from hpdm.evaluation.motion import evaluate_motion, motion_table, read_synthetic_set
from hpdm.files import write_json
from hpdm.patch.model import HPDM
from hpdm.patch.sampler import Sampler, SamplerOptions
from hpdm.text import EmbeddingStore
from hpdm.training.checkpoint import load_model

Metric = Literal["denoising", "motion", "fvd", "is"]

MOTION_SAMPLES = 96


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run: its denoising error on clips, or what its samples are like."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints."""
    data: Path
    """Folder of videos."""
    metrics: tuple[Metric, ...] = ("denoising",)
    """denoising: error of v per level and noise level. motion: motion, shape, colour and texture of sampled clips of
    the synthetic set, beside real ones. fvd, is: Frechet video distance and Inception score of samples."""
    split: Literal["train", "test"] | None = None
    """Use UCF-101's official split; fvd wants it said where there is one (published: train)."""
    clips: int = 64
    """Denoising: clips to take, evenly spread over the set."""
    embeddings: Path | None = None
    """Denoising, runs with text: folder that `hpdm data embed` wrote, with the captions of the clips."""
    bins: int = 4
    """Denoising: ranges of the diffusion time, from clean to noise."""
    samples: int | None = None
    """Videos to sample: the protocol's for fvd and is; 96 for motion, classes in turn, and as many real clips."""
    generated: Path | None = None
    """Folder of videos that `hpdm sample` wrote, to take in place of sampling."""
    protocol: ProtocolName = "paper"
    """fvd, is: how many videos; paper: all real, 10,000 sampled; stylegan-v: 2,048 of each."""
    frames: int = 16
    """fvd, is: frames of a video, the first ones of a sampled one."""
    detector: Path | None = None
    """fvd: TorchScript file of I3D, called as StyleGAN-V's export is."""
    classifier: Path | None = None
    """is: TorchScript file of C3D, giving probabilities."""
    statistics: Path | None = None
    """fvd: folder that keeps the features of real clips for the next run."""
    sampler: Annotated[SamplerOptions, tyro.conf.arg(name="")] = field(default_factory=SamplerOptions)
    """How to sample."""
    batch: int = 16
    """Clips at a time."""
    seed: int = 0
    """Of noise, real windows, classes and the first sampled video; the others count up."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    weights: Literal["ema", "model"] = "ema"
    json: Path | None = None
    """Write the result here too."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("clips", "bins", "samples", "batch", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected at least 0")
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

    def run(self) -> int:
        """The command ``hpdm evaluate``; returns the exit status."""
        with distributed.process_group(pick_device(self.device)):
            result = evaluate(self)
            if distributed.is_first():
                self._report(result)
        return 0

    def _report(self, result: dict[str, Any]) -> None:
        print(f"step {result['step']} of {self.run_folder} ({self.weights}), {self.data}, split {self.split or 'none'}")
        if "denoising" in self.metrics:
            print(f"mean squared error of v, {result['clips']} clips")
            print(denoising_table(result))
        if "motion" in self.metrics:
            print(motion_table(result["motion"]))
        if "distribution" in result:
            found = result["distribution"]
            print(distribution_lines(found))
            print(f"  protocol {self.protocol}, first {found['frames']} of {found['frames_generated']} frames at "
                  f"{'x'.join(map(str, found['size']))}, seed {self.seed}")  # fmt: skip
        if self.json is not None:
            write_json(self.json, result)


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs the evaluation. Under ``torchrun`` every process calls it and gets the same.

    Returns:
        ``step``; with the metric denoising ``clips``, ``times`` (the ranges) and ``error[level][range]``; with motion
        ``motion``, see :func:`hpdm.evaluation.motion.evaluate_motion`; with fvd or is ``distribution``, see
        :func:`hpdm.evaluation.distribution.evaluate_distribution`.

    Raises:
        FileNotFoundError: no such run, data, split or detector.
        ValueError: the data has other classes than the run, or something does not serve the metric.
        RuntimeError: another process failed before the work began.
    """
    with distributed.process_group(pick_device(options.device)) as device:
        return _evaluate(options, device)


def _evaluate(options: EvaluateOptions, device: torch.device) -> dict[str, Any]:
    distributed.assert_same_on_all_ranks("options", asdict(options))
    with distributed.raise_on_all_ranks():
        model, names, training, step = load_model(
            options.run_folder, kernels=options.kernels, device=device, weights=options.weights
        )
        work = _Evaluation(options, model, names, training)
        # What is wrong with the input should show before anything is computed.
        work.check()
    result: dict[str, Any] = {"step": step}
    if "denoising" in options.metrics:
        result |= work.denoising()
    if "motion" in options.metrics:
        result["motion"] = work.motion()
    if {"fvd", "is"} & set(options.metrics):
        result["distribution"] = work.distribution(device)
    return result


class _Evaluation:
    """A run and the data that it is held against."""

    def __init__(self, options: EvaluateOptions, model: HPDM, names: list[str], training: dict[str, Any]) -> None:
        self.options, self.model, self.names, self.training = options, model, names, training
        self.frames, *size = model.config.resolution
        self.size = (size[0], size[1])
        self.by_class = model.config.conditioning == "class"

    def dataset(self, **changes: Any) -> VideoDataset:
        """Clips as the run's training reads them; the middle window of each."""
        values = {
            "frames": self.frames,
            "size": self.size,
            "stride": int(self.training["stride"]),
            "fps": self.training.get("fps"),
            "split": self.options.split,
            "train": False,
            "short": self.training["short"],
        }
        dataset = VideoDataset(self.options.data, **(values | changes))
        if self.by_class and dataset.class_names != self.names:
            raise ValueError(f"data: got classes {dataset.class_names}, expected {self.names} as in the run")
        return dataset

    def check(self) -> None:
        """Raises what can be told without work."""
        options, kind = self.options, self.model.config.conditioning
        wanted = set(options.metrics)
        dataset = self.dataset()
        if "denoising" in wanted and (kind == "text") != (options.embeddings is not None):
            what = "the folder that `hpdm data embed` wrote" if kind == "text" else "none"
            raise ValueError(
                f"embeddings: got {options.embeddings or 'none'}, expected {what} for conditioning={kind!r}"
            )
        if wanted & {"motion", "fvd", "is"} and options.generated is None and kind == "text":
            raise ValueError(
                "run: it is conditioned on text, expected --generated, a folder of videos that `hpdm sample --prompts` "
                "wrote"
            )
        if "motion" in wanted:
            read_synthetic_set(dataset)
            if kind != "class":
                raise ValueError(f"run: got a run with conditioning {kind!r}, expected 'class' for motion")
        if wanted & {"fvd", "is"} and options.frames > self.frames:
            raise ValueError(f"frames: got {options.frames}, expected at most {self.frames}, the frames of the run")
        if "fvd" in wanted and options.split is None and _has_split(dataset):
            raise ValueError(f"split: got none, but {options.data} has split lists: expected train (published) or test")

    def denoising(self) -> dict[str, Any]:
        options, store = self.options, None
        if options.embeddings is not None:
            store = EmbeddingStore(options.embeddings, self.model.config.text_width)
        dataset = self.dataset(captions=store is not None)
        return evaluate_denoising(
            self.model,
            dataset,
            clips=options.clips,
            bins=options.bins,
            batch=options.batch,
            seed=options.seed,
            embeddings=store,
        )

    def motion(self) -> dict[str, Any]:
        options, dataset = self.options, self.dataset()
        if options.generated is not None:
            files = find_generated(options.generated, options.samples)
            asked = [class_of_file(path, self.names) for path in files]
            clips, origin = read_generated(files, self.frames, self.size), {"generated": str(options.generated)}
        else:
            labels = [i % len(self.names) for i in range(options.samples or MOTION_SAMPLES)]
            asked = [self.names[label] for label in labels]
            clips, origin = self.sampled(labels, len(labels)), self.origin()
        return evaluate_motion(dataset, clips, asked, real=len(asked)) | {"origin": origin}

    def distribution(self, device: torch.device) -> dict[str, Any]:
        options = self.options
        protocol = PROTOCOLS[options.protocol]
        detector = None if options.detector is None else Detector(options.detector, "features", device)
        classifier = None if options.classifier is None else Detector(options.classifier, "classes", device)
        windows = self.dataset(frames=options.frames, train=True, short="skip", seed=options.seed)
        if options.generated is not None:
            files = find_generated(options.generated, options.videos)
            clips, origin = read_generated(files, options.frames, self.size), {"generated": str(options.generated)}
        else:
            labels = draw_labels(windows.labels if self.by_class else None, options.videos, options.seed)
            clips, origin = self.sampled(labels, options.videos), self.origin()
        real = None
        if "fvd" in options.metrics and detector is not None:
            real = real_statistics(
                windows, detector, count=protocol.real, batch=options.batch, folder=options.statistics
            )
        found = evaluate_distribution(
            clips,
            frames=options.frames,
            batch=options.batch,
            detector=detector if "fvd" in options.metrics else None,
            real=real,
            classifier=classifier if "is" in options.metrics else None,
        )
        about = {
            "protocol": options.protocol,
            "split": options.split,
            "size": list(self.size),
            "frames_generated": self.frames,
            "stride": windows.stride,
            "fps": windows.fps,
            "seed": options.seed,
            "weights": options.weights,
        }
        return found | about | {"origin": origin}

    def sampled(self, labels: list[int] | None, count: int) -> Iterator[tuple[int, Tensor]]:
        sampler = Sampler(self.model, self.options.sampler)
        return sample_clips(sampler, self.options.seed, labels, count, self.options.batch)

    def origin(self) -> dict[str, Any]:
        """How videos were sampled."""
        return {"first_seed": self.options.seed, "sampler": asdict(self.options.sampler)}


def _has_split(dataset: VideoDataset) -> bool:
    try:
        find_split_file(dataset.root, "train", 1)
    except FileNotFoundError:
        return False
    return True
