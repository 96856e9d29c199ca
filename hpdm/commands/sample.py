"""``hpdm sample``: videos from a trained run, as mp4 files and a contact sheet.

Started by ``torchrun`` the processes share the tiles of every level; the first one writes the files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.commands.embed import read_prompts
from hpdm.commands.subjects import Subject, conditions, embed_prompts, subjects_of_classes, subjects_of_prompts
from hpdm.data.clips import VideoDataset
from hpdm.distributed import pick_device
from hpdm.files import atomic_path
from hpdm.patch.boxes import AXES
from hpdm.patch.config import HPDMConfig
from hpdm.patch.sampler import Sampler, SamplerOptions
from hpdm.patch.seams import seam_energy
from hpdm.planning.sampling_cost import plan_line
from hpdm.text import normalised
from hpdm.training.checkpoint import load_model
from hpdm.video import to_uint8, write_contact_sheet, write_video

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
    count: int | None = None
    """Number of videos: one per prompt, or 6, if not given. Classes or prompts are taken in turn."""
    classes: tuple[str, ...] = ()
    """Names (or numbers) of classes; all if not given."""
    prompts: tuple[str, ...] = ()
    """What the videos are to show, for a run with text; "" for nothing in particular."""
    prompts_file: Path | None = None
    """Text file with one prompt a line."""
    encoder: str | None = None
    """Text encoder of the run's embeddings: its folder, or its name on the hub if it is in the local cache."""
    embeddings: Path | None = None
    """Instead of --encoder: a folder of `hpdm data embed` that has the prompts."""
    seed: int = 0
    """Seed of the first video; the others count up."""
    sampler: Annotated[SamplerOptions, tyro.conf.arg(name="")] = field(default_factory=SamplerOptions)
    """How to sample."""
    compare_overlap: bool = False
    """Render the eight strategies of Table 4 side by side instead, with a measure of how much the tiles show."""
    batch: int = 6
    """Videos at a time."""
    kernels: Literal["auto", "reference", "torch", "triton"] = "auto"
    weights: Literal["ema", "model"] = "ema"
    fps: float = 16.0
    columns: int = 8
    """Frames per video on the contact sheet."""
    real: Path | None = None
    """Set with the run's classes, or with the prompts among its captions: a real clip goes above each generated one on
    the contact sheet."""
    split: Literal["train", "test"] | None = None
    """UCF-101's official split of --real."""
    save_levels: bool = False
    """Write the lower levels' videos too."""
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("count", "batch", "columns"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        asked = bool(self.prompts) or self.prompts_file is not None
        sources = [name for name in ("encoder", "embeddings") if getattr(self, name) is not None]
        if len(sources) != asked:
            got = f"{'prompts' if asked else 'no prompts'} with {' and '.join(sources) or 'neither'}"
            raise ValueError(f"prompts: got {got}, expected prompts with one of --encoder and --embeddings")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, expected at least 0")

    def run(self) -> int:
        """The command ``hpdm sample``; returns the exit status."""
        sample(self)
        return 0


def find_subjects(options: SampleOptions, config: HPDMConfig, names: list[str], device: torch.device) -> list[Subject]:
    """What each video is to show; the first process embeds the prompts.

    Raises:
        ValueError: prompts for a run without text; classes or nothing for one with it; a class that the run does not
            have; a prompt without an embedding.
    """
    prompts = [*options.prompts, *(read_prompts(options.prompts_file) if options.prompts_file is not None else [])]
    count = options.count or len(prompts) or 6
    kind = config.conditioning
    if kind != "text":
        if prompts:
            raise ValueError(f"prompts: got {len(prompts)}, expected none for a run with conditioning={kind!r}")
        return subjects_of_classes(options.classes, names if kind == "class" else [], count)
    if options.classes or not prompts:
        got = f"classes {', '.join(options.classes)}" if options.classes else "none"
        raise ValueError(
            f'prompts: got {got}, expected --prompts or --prompts-file for a run with text ("" for no text)'
        )
    texts: list[Tensor] = []
    with distributed.raise_on_all_ranks():
        if distributed.is_first():
            texts = embed_prompts(prompts, config.text_width, options.encoder, options.embeddings, device)
    return subjects_of_prompts(prompts, distributed.broadcast(texts), count)


def real_clips(
    options: SampleOptions, config: HPDMConfig, training: dict[str, Any], names: list[str], subjects: list[Subject]
) -> list[Tensor]:
    """One real clip for each generated video, of the same class or caption: uint8 ``[3, F, H, W]`` each.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: other classes than the run's, or a class or a caption without clips.
    """
    if options.real is None:
        return []
    frames, height, width = config.resolution
    by_caption = config.conditioning == "text"
    dataset = VideoDataset(
        options.real,
        frames=frames,
        size=(height, width),
        stride=int(training["stride"]),
        fps=training.get("fps"),  # not an option of runs of an earlier version
        split=options.split,
        train=False,
        short=training["short"],
        captions=by_caption,
    )
    if not by_caption and dataset.class_names != names:
        raise ValueError(f"real: got classes {dataset.class_names}, expected {names} as in the run")
    found: dict[str, list[int]] = {}
    for i, file in enumerate(dataset.files):
        found.setdefault(normalised(file.caption) if by_caption else str(file.label), []).append(i)
    clips, taken = [], Counter[str]()
    for subject in subjects:
        key = normalised(subject.caption) if by_caption else str(subject.label or 0)
        if key not in found:
            raise ValueError(f"real: {options.real} has no clip of {subject.caption!r}")
        clips.append(dataset[found[key][taken[key] % len(found[key])]]["video"])
        taken[key] += 1
    return clips


def sample(options: SampleOptions) -> list[Path]:
    """Samples, writes the files and returns the paths of the mp4 files.

    An interrupted run goes on with the level that it was at: finished levels are kept in ``OUT/.unfinished`` until all
    videos are written.

    Raises:
        FileNotFoundError: no run, or no checkpoint in it.
        ImportError, OSError: the text encoder.
        ValueError: an unknown class, a prompt without embedding, or an option out of range.
    """
    with distributed.process_group(pick_device(options.device)) as device:
        return _sample(options, device)


def _sample(options: SampleOptions, device: torch.device) -> list[Path]:
    first, processes = distributed.is_first(), distributed.world_size()
    model, names, training, step = load_model(
        options.run_folder, kernels=options.kernels, device=device, weights=options.weights
    )
    subjects = find_subjects(options, model.config, names, device)
    count = len(subjects)
    real = real_clips(options, model.config, training, names, subjects)
    strategies = OVERLAPS if options.compare_overlap else (options.sampler.overlap,)
    samplers = {o: Sampler(model, replace(options.sampler, overlap=o)) for o in strategies}
    if first:
        options.out.mkdir(parents=True, exist_ok=True)
        print(f"checkpoint of step {step}: {count} videos on {device}, {processes} process(es)")
        for name, sampler in samplers.items():
            line = plan_line(model, sampler.options, count, min(options.batch, count), processes)
            print(f"overlap {name}: {line}" if options.compare_overlap else line, flush=True)
    identity = {"run": str(options.run_folder.resolve()), "step": step, "weights": options.weights}
    identity |= {"text": options.encoder or str(options.embeddings)}
    paths, sheet, captions = [], [], []
    seams: dict[str, list[dict[str, float]]] = {name: [] for name in strategies}
    started = time.perf_counter()
    for begin in range(0, count, options.batch):
        some = subjects[begin : begin + options.batch]
        seeds = range(options.seed + begin, options.seed + begin + len(some))
        made = {
            name: _levels(sampler, seeds, some, options.out, identity, show=first) for name, sampler in samplers.items()
        }
        if not first:
            continue
        for row, (seed, subject) in enumerate(zip(seeds, some)):
            stem = f"{subject.stem}_seed{seed}"
            if real:
                sheet.append(real[begin + row])
                captions.append(f"{subject.caption}, real")
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
                captions.append(subject.caption + note)
                seams[name].append(seam_energy(levels[-1][row], samplers[name].tilings[-1]))
    if not first:
        return []
    write_contact_sheet(
        options.out / "contact_sheet.png",
        sheet,
        columns=options.columns,
        labels=captions if conditions(subjects) or real or options.compare_overlap else None,
        scale=max(1, 128 // model.config.resolution[2]),  # small videos are hard to see
    )
    if options.compare_overlap:
        print(seam_table(seams))
    shutil.rmtree(options.out / UNFINISHED, ignore_errors=True)
    print(f"{len(paths)} videos and contact_sheet.png in {options.out}, {time.perf_counter() - started:.1f} s")
    return paths


def _levels(
    sampler: Sampler, seeds: Sequence[int], subjects: Sequence[Subject], out: Path, identity: dict[str, Any], show: bool
) -> list[Tensor]:
    """The videos of every level, from what an interrupted run left and the sampler; kept level by level on disk."""
    # How many tiles go at a time and where features lie change nothing but rounding.
    choices = asdict(replace(sampler.options, tile_batch=1, cache="gpu"))
    wanted = identity | {"seeds": list(seeds), "subjects": [subject.caption for subject in subjects]} | choices
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    path = out / UNFINISHED / f"{key}.safetensors"
    done = distributed.broadcast(_read_levels(path) if show else [])
    if done and show:
        print(f"found {len(done)} finished level(s) of seeds {seeds[0]} to {seeds[-1]}, going on from there")
    levels = list(done)

    def keep(level: int, video: Tensor) -> None:
        levels.append(video.cpu())
        if show:
            path.parent.mkdir(exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({str(n): v.contiguous() for n, v in enumerate(levels)}, temporary)

    condition = conditions(subjects)
    if show:
        with _Bars() as bars:
            sampler(seeds, **condition, progress=bars, finished=done, on_level=keep)
    else:
        sampler(seeds, **condition, finished=done, on_level=keep)
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
