"""``hpdm sample``: videos from a trained run, as mp4 files and a contact sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from hpdm.checkpoint import load_model
from hpdm.config import HPDMConfig
from hpdm.data import VideoDataset
from hpdm.sampler import Sampler, SamplerOptions
from hpdm.train import pick_device, to_uint8
from hpdm.video import write_contact_sheet, write_video


@dataclass(frozen=True)
class SampleOptions:
    """Sample videos from a trained run."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints."""
    out: Path
    """Folder for the mp4 files and contact_sheet.png."""
    count: int = 6
    """Number of videos; classes are taken in turn unless --classes says which."""
    classes: tuple[str, ...] = ()
    """Names (or numbers) of classes, taken in turn."""
    seed: int = 0
    """Seed of the first video; the others count up."""
    steps: int = 128
    """Steps on level 0, halved with every level."""
    overlap: str = "fhw"
    """Axes on which tiles overlap by 50 %: none, or some of f, h, w."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none."""
    churn: float = 10.0
    """Stochasticity on level 0; 0 is deterministic."""
    batch: int = 6
    """Videos at a time."""
    tile_batch: int = 64
    """Patches per network call."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    weights: Literal["ema", "model"] = "ema"
    fps: float = 16.0
    columns: int = 8
    """Frames per video on the contact sheet."""
    real: Path | None = None
    """Folder of videos with the run's classes: a real clip goes above each generated one on the contact sheet."""
    split: Literal["train", "test"] | None = None
    """UCF-101's official split of --real."""
    save_levels: bool = False
    """Write the lower levels' videos too."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("count", "batch", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected at least 0")

    def run(self) -> int:
        """The command ``hpdm sample``; returns the exit status."""
        sample(self)
        return 0


def class_numbers(asked: tuple[str, ...], names: list[str], count: int) -> list[int]:
    """Class numbers of ``count`` videos.

    Raises:
        ValueError: a class that the run does not have.
    """
    numbers = []
    for name in asked:
        if name in names:
            numbers.append(names.index(name))
        elif name.isdecimal() and int(name) < len(names):
            numbers.append(int(name))
        else:
            raise ValueError(
                f"classes: got {name!r}, expected one of {', '.join(names) or 'none (the run has no classes)'}"
            )
    numbers = numbers or list(range(len(names)))
    return [numbers[i % len(numbers)] for i in range(count)] if names else []


def real_clips(
    options: SampleOptions, config: HPDMConfig, training: dict[str, Any], names: list[str], numbers: list[int]
) -> list[Tensor]:
    """One real clip for each generated video, of the same class: uint8 ``[3, F, H, W]`` each.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: other classes than the run's, or a class without clips.
    """
    if options.real is None:
        return []
    frames, height, width = config.resolution
    dataset = VideoDataset(
        options.real,
        frames=frames,
        size=(height, width),
        stride=int(training["stride"]),
        split=options.split,
        train=False,
        short=training["short"],
    )
    if dataset.class_names != names:
        raise ValueError(f"real: got classes {dataset.class_names}, expected {names} as in the run")
    labels = numbers or [0] * options.count
    clips = []
    for row, label in enumerate(labels):
        own = [i for i, file in enumerate(dataset.files) if file.label == label]
        if not own:
            raise ValueError(f"real: {options.real} has no clip of class {names[label]!r}")
        clips.append(dataset[own[labels[:row].count(label) % len(own)]]["video"])
    return clips


def sample(options: SampleOptions) -> list[Path]:
    """Samples, writes the files and returns the paths of the mp4 files.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        ValueError: an unknown class or an option out of range.
    """
    device = pick_device(options.device)
    model, names, training, step = load_model(
        options.run_folder, kernels=options.kernels, device=device, weights=options.weights
    )
    numbers = class_numbers(options.classes, names, options.count)
    real = real_clips(options, model.config, training, names, numbers)
    sampler = Sampler(
        model,
        SamplerOptions(
            steps=options.steps,
            overlap=options.overlap,
            guidance=options.guidance,
            churn=options.churn,
            tile_batch=options.tile_batch,
        ),
    )
    tiles = "/".join(str(t.tiles) for t in sampler.tilings)
    steps = "/".join(str(sampler.options.level_steps(n)) for n in range(model.config.levels))
    print(f"checkpoint of step {step}: {options.count} videos, tiles per level {tiles}, steps {steps}, {device}")
    options.out.mkdir(parents=True, exist_ok=True)
    paths, sheet, captions = [], [], []
    started = time.perf_counter()
    for first in range(0, options.count, options.batch):
        seeds = range(options.seed + first, options.seed + min(first + options.batch, options.count))
        labels = torch.tensor(numbers[first : first + len(seeds)]) if numbers else None
        with _Bars() as bars:
            levels = sampler(seeds, labels, progress=bars)
        for row, seed in enumerate(seeds):
            name = names[numbers[first + row]] if numbers else "video"
            stem = f"{name}_seed{seed}"
            paths.append(options.out / f"{stem}.mp4")
            frames = to_uint8(levels[-1][row])
            write_video(paths[-1], frames, fps=options.fps)
            if options.save_levels:
                for n, video in enumerate(levels[:-1]):
                    write_video(options.out / f"{stem}_level{n}.mp4", to_uint8(video[row]), fps=options.fps)
            if real:
                sheet.append(real[first + row])
                captions.append(f"{name}, real")
            sheet.append(frames)
            captions.append(f"{name}, generated" if real else name)
    write_contact_sheet(
        options.out / "contact_sheet.png",
        sheet,
        columns=options.columns,
        labels=captions if names or real else None,
        scale=max(1, 128 // model.config.resolution[2]),  # small videos are hard to see
    )
    print(f"{len(paths)} videos and contact_sheet.png in {options.out}, {time.perf_counter() - started:.1f} s")
    return paths


class _Bars:
    """One progress bar per level, each with its own ETA."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.level = -1

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, level: int, done: int, calls: int) -> None:
        if level != self.level:
            if self.bar is not None:
                self.bar.close()
            self.level, self.bar = level, tqdm(total=calls, desc=f"level {level}", unit="call", dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
