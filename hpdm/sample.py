"""``hpdm sample``: videos from a trained run, as mp4 files and a contact sheet.

Started by ``torchrun`` the processes share the tiles of every level; the first one writes the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hpdm import ranks
from hpdm.checkpoint import load_model
from hpdm.config import HPDMConfig
from hpdm.data import VideoDataset
from hpdm.pyramid import AXES
from hpdm.sampler import CacheMode, Sampler, SamplerOptions, SolverName
from hpdm.sampling_plan import plan_line
from hpdm.seams import seam_energy
from hpdm.device import pick_device
from hpdm.video import atomic_path, to_uint8, write_contact_sheet, write_video

OVERLAPS = ("none", "w", "h", "hw", "f", "fw", "fh", "fhw")
"""The strategies of the paper's Table 4."""

UNFINISHED = ".unfinished"
"""Folder beside the videos with the finished levels of a run under way."""


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
    """Steps on level 0."""
    steps_decay: float = 0.5
    """Factor on the steps with every level."""
    solver: SolverName = "edm"
    """On level 0: edm (second order with churn), heun (second order), ddim (first order)."""
    later_solver: SolverName = "ddim"
    """On the levels above."""
    overlap: str = "fhw"
    """Axes on which tiles overlap: none, or some of f, h, w."""
    tiles_per_patch: int = 2
    """Tiles that start within one patch on these axes: 2 is 50 % overlap, 4 is 75 %."""
    compare_overlap: bool = False
    """Render the eight strategies of Table 4 side by side instead, with a measure of how much the tiles show."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none."""
    churn: float = 10.0
    """Stochasticity of the solver edm."""
    batch: int = 6
    """Videos at a time."""
    tile_batch: int = 64
    """Patches per network call."""
    cache: CacheMode = "gpu"
    """Features of finished levels: on the device (gpu), in host memory, fetched ahead (cpu), or computed anew (off)."""
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
        self.sampler_options()

    def sampler_options(self) -> SamplerOptions:
        """Those of the sampler, checked."""
        return SamplerOptions(
            steps=self.steps, steps_decay=self.steps_decay, solver=self.solver, later_solver=self.later_solver,
            overlap=self.overlap, tiles_per_patch=self.tiles_per_patch, guidance=self.guidance, churn=self.churn,
            tile_batch=self.tile_batch, cache=self.cache,
        )  # fmt: skip

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

    An interrupted run goes on with the level that it was at: finished levels are kept in ``OUT/.unfinished`` until all
    videos are written.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        ValueError: an unknown class or an option out of range.
    """
    with ranks.joined(pick_device(options.device)) as device:
        return _sample(options, device)


def _sample(options: SampleOptions, device: torch.device) -> list[Path]:
    first, processes = ranks.world()[0] == 0, ranks.world()[1]
    model, names, training, step = load_model(
        options.run_folder, kernels=options.kernels, device=device, weights=options.weights
    )
    numbers = class_numbers(options.classes, names, options.count)
    real = real_clips(options, model.config, training, names, numbers)
    strategies = OVERLAPS if options.compare_overlap else (options.overlap,)
    samplers = {o: Sampler(model, replace(options.sampler_options(), overlap=o)) for o in strategies}
    if first:
        options.out.mkdir(parents=True, exist_ok=True)
        print(f"checkpoint of step {step}: {options.count} videos on {device}, {processes} process(es)")
        for name, sampler in samplers.items():
            line = plan_line(model, sampler.options, options.count, min(options.batch, options.count), processes)
            print(f"overlap {name}: {line}" if options.compare_overlap else line, flush=True)
    identity = {"run": str(options.run_folder.resolve()), "step": step, "weights": options.weights}
    paths, sheet, captions = [], [], []
    seams: dict[str, list[dict[str, float]]] = {name: [] for name in strategies}
    started = time.perf_counter()
    for begin in range(0, options.count, options.batch):
        seeds = range(options.seed + begin, options.seed + min(begin + options.batch, options.count))
        labels = torch.tensor(numbers[begin : begin + len(seeds)]) if numbers else None
        made = {
            name: _levels(sampler, seeds, labels, options.out, identity, show=first)
            for name, sampler in samplers.items()
        }
        if not first:
            continue
        for row, seed in enumerate(seeds):
            label = names[numbers[begin + row]] if numbers else "video"
            stem = f"{label}_seed{seed}"
            if real:
                sheet.append(real[begin + row])
                captions.append(f"{label}, real")
            for name, levels in made.items():
                suffix = f"_overlap_{name}" if options.compare_overlap else ""
                frames = to_uint8(levels[-1][row])
                paths.append(options.out / f"{stem}{suffix}.mp4")
                write_video(paths[-1], frames, fps=options.fps)
                if options.save_levels:
                    for n, video in enumerate(levels[:-1]):
                        write_video(options.out / f"{stem}{suffix}_level{n}.mp4", to_uint8(video[row]), fps=options.fps)
                sheet.append(frames)
                note = f", overlap {name}" if options.compare_overlap else ", generated" if real else ""
                captions.append(label + note)
                seams[name].append(seam_energy(levels[-1][row], samplers[name].tilings[-1]))
    if not first:
        return []
    write_contact_sheet(
        options.out / "contact_sheet.png",
        sheet,
        columns=options.columns,
        labels=captions if names or real or options.compare_overlap else None,
        scale=max(1, 128 // model.config.resolution[2]),  # small videos are hard to see
    )
    if options.compare_overlap:
        print(seam_table(seams))
    shutil.rmtree(options.out / UNFINISHED, ignore_errors=True)
    print(f"{len(paths)} videos and contact_sheet.png in {options.out}, {time.perf_counter() - started:.1f} s")
    return paths


def _levels(
    sampler: Sampler, seeds: Sequence[int], labels: Tensor | None, out: Path, identity: dict[str, Any], show: bool
) -> list[Tensor]:
    """The videos of every level, from what an interrupted run left and the sampler; kept level by level on disk."""
    # How many tiles go at a time and where features lie change nothing but rounding.
    choices = asdict(replace(sampler.options, tile_batch=1, cache="gpu"))
    wanted = identity | {"seeds": list(seeds), "labels": None if labels is None else labels.tolist()} | choices
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = out / UNFINISHED / f"{key}.safetensors"
    done = ranks.from_first(_read_levels(path) if show else [])
    if done and show:
        print(f"found {len(done)} finished level(s) of seeds {seeds[0]} to {seeds[-1]}, going on from there")
    levels = list(done)

    def keep(level: int, video: Tensor) -> None:
        levels.append(video.cpu())
        if show:
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({str(n): v.contiguous() for n, v in enumerate(levels)}, temporary)

    if show:
        with _Bars() as bars:
            sampler(seeds, labels, progress=bars, finished=done, on_level=keep)
    else:
        sampler(seeds, labels, finished=done, on_level=keep)
    return levels


def _read_levels(path: Path) -> list[Tensor]:
    if not path.exists():
        return []
    try:
        with safe_open(path, "pt") as file:
            return [file.get_tensor(str(n)) for n in range(len(file.keys()))]
    except SafetensorError as error:
        raise ValueError(f"out: {path} of an interrupted run is damaged ({error}); delete it") from None


def seam_table(seams: dict[str, list[dict[str, float]]]) -> str:
    """Per strategy the seam energy on each axis, the mean over videos: 1 where tiles do not show."""
    lines = [
        f"{'overlap':<10}" + "".join(f"{axis:>8}" for axis in AXES) + "   gradient energy across tile borders / inside"
    ]
    for name, videos in seams.items():
        cells = []
        for axis in AXES:
            values = [found[axis] for found in videos if axis in found]
            cells.append(f"{sum(values) / len(values):>8.2f}" if values else f"{'-':>8}")
        lines.append(f"{name:<10}" + "".join(cells))
    return "\n".join(lines)


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
