"""``hpdm evaluate``: how well a run denoises clips, per level and per noise level.

The number is the training loss without its randomness: the same clips, boxes, times and noise whatever the model, so
that two runs, or a run on its training and its held-out clips, can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from hpdm.checkpoint import load_model, write_json
from hpdm.data import VideoDataset
from hpdm.objective import denoising_error
from hpdm.train import collate, pick_device, step_generator


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run's denoising error on clips, per level and noise level."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints."""
    data: Path
    """Folder of videos."""
    split: Literal["train", "test"] | None = None
    """Use UCF-101's official split."""
    clips: int = 64
    """Clips to take, evenly spread over the set."""
    bins: int = 4
    """Ranges of the diffusion time, from clean to noise."""
    batch: int = 16
    seed: int = 0
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    weights: Literal["ema", "model"] = "ema"
    json: Path | None = None
    """Write the result here too."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("clips", "bins", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")

    def run(self) -> int:
        """The command ``hpdm evaluate``; returns the exit status."""
        result = evaluate(self)
        print(
            f"step {result['step']}, {result['clips']} clips of {self.data}, mean squared error of v ({self.weights})"
        )
        heads = [f"t {low:.2f}-{high:.2f}" for low, high in result["times"]]
        print("level   " + "".join(f"{head:>14}" for head in (*heads, "mean")))
        for level, row in enumerate(result["error"]):
            print(f"{level:<8}" + "".join(f"{value:14.5f}" for value in (*row, sum(row) / len(row))))
        if self.json is not None:
            write_json(self.json, result)
        return 0


@torch.no_grad()
def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs the evaluation.

    Returns:
        ``step``, ``clips``, ``times`` (the ranges) and ``error[level][range]``.

    Raises:
        FileNotFoundError: no such run or data.
        ValueError: the data has other classes than the run.
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
    count = min(options.clips, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    edges = [i / options.bins for i in range(options.bins + 1)]
    times = list(pairwise(edges))
    total = torch.zeros(config.levels, options.bins, dtype=torch.float64)
    for first in tqdm(range(0, count, options.batch), unit="batch", dynamic_ncols=True):
        batch = collate([dataset[i] for i in chosen[first : first + options.batch]])
        video = batch["video"].to(device)
        labels = batch["labels"].to(device) if config.conditioning == "class" else None
        for n, span in enumerate(times):
            generator = step_generator(options.seed, first * options.bins + n)
            total[:, n] += denoising_error(model, video, labels, generator, span).double().sum(0).cpu()
    return {"step": step, "clips": count, "times": times, "error": (total / count).tolist()}
