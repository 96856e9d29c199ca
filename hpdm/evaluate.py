"""``hpdm evaluate``: how good a run is. What is measured is in the modules named ``*_eval``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from hpdm.checkpoint import load_model, write_json
from hpdm.data import VideoDataset
from hpdm.denoising_eval import denoising_table, evaluate_denoising
from hpdm.device import pick_device
from hpdm.generate import sample_clips
from hpdm.model import HPDM
from hpdm.motion_eval import evaluate_motion, motion_table, read_synthetic_set
from hpdm.sampler import Sampler, SamplerOptions

Metric = Literal["denoising", "motion"]


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run: its denoising error on clips, or what its samples are like."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints."""
    data: Path
    """Folder of videos."""
    metrics: tuple[Metric, ...] = ("denoising",)
    """denoising: error of v per level and noise level. motion: motion, shape, colour and texture of sampled clips of
    the synthetic set, beside real ones."""
    split: Literal["train", "test"] | None = None
    """Use UCF-101's official split."""
    clips: int = 64
    """Denoising: clips to take, evenly spread over the set."""
    bins: int = 4
    """Denoising: ranges of the diffusion time, from clean to noise."""
    samples: int = 96
    """Motion: videos to sample, classes in turn, and real clips to take."""
    sampler: Annotated[SamplerOptions, tyro.conf.arg(name="")] = field(default_factory=SamplerOptions)
    """How to sample."""
    batch: int = 16
    """Clips at a time."""
    seed: int = 0
    """Of the noise, and of the first sampled video; the others count up."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    weights: Literal["ema", "model"] = "ema"
    json: Path | None = None
    """Write the result here too."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("clips", "bins", "samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected at least 0")
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"metrics: got {list(self.metrics)}, expected one or more different ones")
        if self.json is not None and not self.json.parent.is_dir():
            raise FileNotFoundError(f"json: folder {self.json.parent} does not exist")

    def run(self) -> int:
        """The command ``hpdm evaluate``; returns the exit status."""
        result = evaluate(self)
        print(f"step {result['step']} of {self.run_folder} ({self.weights}), {self.data}, split {self.split or 'none'}")
        if "denoising" in self.metrics:
            print(f"mean squared error of v, {result['clips']} clips")
            print(denoising_table(result))
        if "motion" in self.metrics:
            print(motion_table(result["motion"]))
        if self.json is not None:
            write_json(self.json, result)
        return 0


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs the evaluation.

    Returns:
        ``step``; with the metric denoising ``clips``, ``times`` (the ranges) and ``error[level][range]``; with motion
        ``motion``, see :func:`hpdm.motion_eval.evaluate_motion`.

    Raises:
        FileNotFoundError: no such run or data.
        ValueError: the data has other classes than the run, or does not serve the metric.
    """
    device = pick_device(options.device)
    model, names, training, step = load_model(
        options.run_folder, kernels=options.kernels, device=device, weights=options.weights
    )
    config = model.config
    frames, height, width = config.resolution
    dataset = VideoDataset(
        options.data,
        frames=frames,
        size=(height, width),
        stride=int(training["stride"]),
        split=options.split,
        train=False,
        short=training["short"],
    )
    if config.conditioning == "class" and dataset.class_names != names:
        raise ValueError(f"data: got classes {dataset.class_names}, expected {names} as in the run")
    if "motion" in options.metrics:
        read_synthetic_set(dataset)  # what is wrong with it should show before anything is computed
        if config.conditioning != "class":
            raise ValueError(f"run: got a run with conditioning {config.conditioning!r}, expected 'class' for motion")
    result: dict[str, Any] = {"step": step}
    if "denoising" in options.metrics:
        result |= evaluate_denoising(
            model, dataset, clips=options.clips, bins=options.bins, batch=options.batch, seed=options.seed
        )
    if "motion" in options.metrics:
        result["motion"] = _motion(options, model, dataset)
    return result


def _motion(options: EvaluateOptions, model: HPDM, dataset: VideoDataset) -> dict[str, Any]:
    names = dataset.class_names
    labels = [i % len(names) for i in range(options.samples)]
    made = sample_clips(Sampler(model, options.sampler), options.seed, labels, options.samples, options.batch)
    found = evaluate_motion(dataset, made, [names[label] for label in labels], real=options.samples)
    return found | {"seed": options.seed, "sampler": asdict(options.sampler)}
