"""``hpdm sample``: samples videos from a trained run, as mp4 files and a contact sheet.

Under ``torchrun`` the ranks share the work, and rank 0 writes the files.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed, runs
from hpdm.checks import at_least
from hpdm.commands import unfinished
from hpdm.commands.common import Kernels, clips_of_run, warn_of_untrained_context
from hpdm.commands.given import GivenOptions
from hpdm.commands.output_names import check_outputs
from hpdm.commands.sample_long import LongVideos, report
from hpdm.commands.sampler_choice import choose_sampler, sampler_not_given
from hpdm.commands.subjects import Subject, conditions, embed_prompts, subjects_of_classes, subjects_of_prompts
from hpdm.commands.unfinished import Unfinished
from hpdm.data.layout import Split
from hpdm.files import check_not_a_file, make_folder
from hpdm.integrity import hash_of_tensor
from hpdm.long_video import LongOptions
from hpdm.runs import Run
from hpdm.sampling import AXES, Sampler, SamplerOptions
from hpdm.text import normalize_caption, read_prompts
from hpdm.video import to_uint8, write_contact_sheet, write_video

OVERLAPS = ("none", "w", "h", "hw", "f", "fw", "fh", "fhw")
"""The strategies of the paper's Table 4."""

SHEET = "contact_sheet.png"
SHEET_WIDTH = 128
"""Narrower videos are enlarged on the contact sheet."""


@dataclass(frozen=True)
class SampleOptions:
    """Sample videos from a trained run."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of the run, or of one of its checkpoints; an exported file; or the name of weights that come with hpdm."""
    out: Path
    """Folder for the mp4 files and contact_sheet.png."""
    count: int | None = None
    """Number of videos. Default: one per prompt, or 6 without prompts. Classes or prompts are taken in turn."""
    classes: tuple[str, ...] = ()
    """Names (or numbers) of classes; all if not given."""
    prompts: tuple[str, ...] = ()
    """Prompts, for a run with text; "" samples without a prompt."""
    prompts_file: Path | None = None
    """Text file with one prompt per line."""
    encoder: str | None = None
    """Text encoder of the run's embeddings: its folder, or its name on the hub if it is in the local cache."""
    embeddings: Path | None = None
    """Instead of --encoder: a folder of `hpdm data embed` that has the prompts."""
    given: Annotated[GivenOptions, tyro.conf.arg(name="")] = field(default_factory=GivenOptions)
    """Length, and frames that the user gives."""
    long: Annotated[LongOptions, tyro.conf.arg(name="")] = field(default_factory=LongOptions)
    """How videos go on that are longer than a clip."""
    seed: int = 0
    """Seed of the first video; the next videos take the next seeds."""
    sampler: Annotated[SamplerOptions, tyro.conf.arg(name="")] = field(default_factory=sampler_not_given)
    """How to sample. Runs with text take the solver "heun" unless another is given (appendix C)."""
    compare_overlap: bool = False
    """Sample every video with each of Table 4's eight strategies, and measure how visible the tile borders are."""
    batch: int = 6
    """Videos at a time."""
    kernels: Kernels = "auto"
    """Backend of every op; "reference" is the paper's formulas without our kernels."""
    weights: str = "ema"
    """Weights of the run: "ema" is their (first) moving average, "ema-0.10" that of a relative width, if the run has
    several, "model" those of the last step."""
    fps: float = 16.0
    columns: int = 8
    """Frames per video on the contact sheet."""
    real: Path | None = None
    """Folder of real videos with the run's classes, or with the prompts among its captions. The contact sheet then
    shows a real clip above each generated one."""
    split: Split | None = None
    """UCF-101's official split of --real."""
    save_levels: bool = False
    """Also write the videos of the lower levels."""
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least(self, 1, "count", "batch", "columns")
        at_least(self, 0, "seed")
        if not 0 < self.fps < math.inf:
            raise ValueError(f"fps: got {self.fps}, expected > 0")
        self._check_length()
        with_prompts = bool(self.prompts) or self.prompts_file is not None
        sources = [name for name in ("encoder", "embeddings") if getattr(self, name) is not None]
        if len(sources) != with_prompts:
            got = f"{'prompts' if with_prompts else 'no prompts'} with {' and '.join(sources) or 'neither'}"
            raise ValueError(f"prompts: got {got}, expected prompts with one of --encoder and --embeddings")

    def _check_length(self) -> None:
        """Raises ValueError for options that do not go with videos of this length."""
        for name in ("compare_overlap", "save_levels"):
            if self.given.is_long and getattr(self, name):
                raise ValueError(f"{name}: got true with {self.given.names}, expected false")
        for name, value in vars(self.long).items():
            if not self.given.is_long and value != getattr(LongOptions(), name):
                raise ValueError(f"{name}: got {value} for videos of a clip's length, expected it with --frames")


def run(options: SampleOptions) -> int:
    """The command ``hpdm sample``; returns the exit status."""
    sample(options)
    return 0


def sample(options: SampleOptions) -> list[Path]:
    """Samples, writes the files and returns the paths of the mp4 files; on ranks other than 0 none.

    Finished parts are kept in ``OUT/.unfinished`` until all videos are written. The same command, called again after an
    interruption, resumes with the first part that was not finished.

    Raises:
        FileExistsError: ``out`` is a file.
        FileNotFoundError: no run, or no checkpoint in it.
        ImportError, OSError: the text encoder cannot be loaded.
        ValueError: an unknown class, a prompt without embedding, or an option out of range.
    """
    started = time.perf_counter()
    check_not_a_file("out", options.out)
    with distributed.process_group(distributed.pick_device(options.device)) as device:
        loaded = runs.load(options.run_folder, kernels=options.kernels, device=device, weights=options.weights)
        if not loaded.system.generates:
            raise ValueError(
                f"run: got {options.run_folder}, an autoencoder, which encodes and decodes videos, expected a run that "
                "samples them; `hpdm evaluate --metrics reconstruction` measures this one"
            )
        options = replace(options, sampler=choose_sampler(loaded, options.sampler))
        warn_of_untrained_context(loaded, options.sampler)
        subjects = find_subjects(options, loaded, device)
        # Checked with the longest ending that a file may get.
        stems = [_stem(subject, options.seed + n) for n, subject in enumerate(subjects)]
        check_outputs(options.out, [f"{stem}_overlap_fhw_level99.mp4" for stem in stems])
        outputs = _Outputs(options, loaded, real_clips(options, loaded, subjects))
        if options.given.is_long:
            return _sample_long(options, loaded, subjects, outputs, started)
        strategies = OVERLAPS if options.compare_overlap else (options.sampler.overlap,)
        samplers = {
            overlap: loaded.system.sampler(loaded.model, replace(options.sampler, overlap=overlap))
            for overlap in strategies
        }
        if distributed.is_first():
            make_folder("out", options.out)
            _announce(options, loaded, samplers, len(subjects))
        with Unfinished(options.out) as kept:
            for first in range(0, len(subjects), options.batch):
                batch = subjects[first : first + options.batch]
                seeds = range(options.seed + first, options.seed + first + len(batch))
                parts = {
                    overlap: _sample_batch(options, loaded, s, seeds, batch, kept) for overlap, s in samplers.items()
                }
                if distributed.is_first():
                    outputs.write(seeds, batch, parts, samplers)
            if not distributed.is_first():
                return []
            outputs.finish(labeled=bool(conditions(subjects)))
            kept.remove()
    print(f"{len(outputs.paths)} videos and {SHEET} in {options.out}, {time.perf_counter() - started:.1f} s")
    return outputs.paths


def _sample_long(
    options: SampleOptions, loaded: Run, subjects: Sequence[Subject], outputs: _Outputs, started: float
) -> list[Path]:
    """:func:`sample` for videos that are sampled window by window."""
    paths = [options.out / f"{_stem(subject, options.seed + n)}.mp4" for n, subject in enumerate(subjects)]
    options.given.check_not_written([*paths, options.out / SHEET])
    videos = LongVideos(loaded, options.sampler, options.long, options.given, options.out, options.fps, options.columns)
    if distributed.is_first():
        make_folder("out", options.out)
        print(*videos.notes, videos.plan_line(len(subjects), min(options.batch, len(subjects))), sep="\n", flush=True)
    with Unfinished(options.out) as kept:
        for first in range(0, len(subjects), options.batch):
            batch = slice(first, first + options.batch)
            seeds = range(options.seed + first, options.seed + first + len(subjects[batch]))
            sheets = videos.sample(seeds, subjects[batch], paths[batch], kept)
            outputs.add_long(first, subjects[batch], paths[batch], sheets)
        if not distributed.is_first():
            return []
        outputs.finish(labeled=bool(conditions(subjects)))
        kept.remove()
    print(report(outputs.paths, videos.frames, started))
    return outputs.paths


def find_subjects(options: SampleOptions, loaded: Run, device: torch.device) -> list[Subject]:
    """The class or prompt of each video. A collective: rank 0 embeds the prompts for all.

    Raises:
        ValueError: prompts for a run without text; classes or nothing for one with it; a class that the run does not
            have; a prompt without an embedding.
    """
    prompts = [*options.prompts, *(read_prompts(options.prompts_file) if options.prompts_file is not None else [])]
    count = options.count or len(prompts) or 6
    kind = loaded.config.conditioning
    if kind != "text":
        if prompts:
            raise ValueError(f"prompts: got {len(prompts)}, expected none for a run with conditioning={kind!r}")
        return subjects_of_classes(options.classes, loaded.classes if kind == "class" else [], count)
    if options.classes or not prompts:
        got = f"classes {', '.join(options.classes)}" if options.classes else "none"
        raise ValueError(
            f'prompts: got {got}, expected --prompts or --prompts-file for a run with text ("" for no text)'
        )
    texts: list[Tensor] = []
    with distributed.raise_on_all_ranks():
        if distributed.is_first():
            width = loaded.config.text_width
            texts = embed_prompts(prompts, width, options.encoder, options.embeddings, device)
    return subjects_of_prompts(prompts, distributed.broadcast(texts), count)


def real_clips(options: SampleOptions, loaded: Run, subjects: Sequence[Subject]) -> list[Tensor]:
    """One real clip for each generated video, of the same class or caption: uint8 ``[3, F, H, W]`` each.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: other classes than the run's, or a class or a caption without clips.
    """
    if options.real is None:
        return []
    by_caption = loaded.config.conditioning == "text"
    dataset = clips_of_run(loaded, options.real, options.split, argument="real", captions=by_caption)
    clips_of: dict[str, list[int]] = {}
    for i, file in enumerate(dataset.files):
        clips_of.setdefault(normalize_caption(file.caption) if by_caption else str(file.label), []).append(i)
    clips, used = [], Counter[str]()
    for subject in subjects:
        key = normalize_caption(subject.caption) if by_caption else str(subject.label or 0)
        if key not in clips_of:
            raise ValueError(f"real: {options.real} has no clip of {subject.caption!r}")
        clips.append(dataset[clips_of[key][used[key] % len(clips_of[key])]]["video"])
        used[key] += 1
    return clips


def _announce(options: SampleOptions, loaded: Run, samplers: dict[str, Sampler], count: int) -> None:
    """Prints the work ahead: number of videos and, per strategy, tiles, memory and time."""
    world_size = distributed.world_size()
    print(f"checkpoint of step {loaded.step}: {count} videos on {loaded.device}, {world_size} process(es)")
    for overlap, sampler in samplers.items():
        at_a_time = min(options.batch, count)
        line = loaded.system.plan_line(loaded.model, sampler.options, count, at_a_time, world_size)
        print(f"overlap {overlap}: {line}" if options.compare_overlap else line, flush=True)


def _sample_batch(
    options: SampleOptions, loaded: Run, sampler: Sampler, seeds: Sequence[int], subjects: Sequence[Subject],
    kept: Unfinished,
) -> list[Tensor]:  # fmt: skip
    """The videos of every part, ``[B, C, F, H, W]`` each. A collective.

    Each part is kept on disk when it is finished. Parts that an interrupted command kept are not sampled again.

    Raises:
        FloatingPointError: a video holds numbers that are not finite.
        LockedError: another command samples the same videos.
    """
    # The tile batch and the place of the cache change a video by rounding at most, so they are not in its identity.
    choices = asdict(replace(sampler.options, tile_batch=1, cache="gpu"))
    identity: dict[str, Any] = {
        "weights": loaded.digest, "seeds": list(seeds), "subjects": [subject.caption for subject in subjects],
        "text": [None if subject.text is None else hash_of_tensor(subject.text.cpu()) for subject in subjects],
        **choices,
    }  # fmt: skip
    first, found, path = distributed.is_first(), list[Tensor](), Path()
    with distributed.raise_on_all_ranks():
        if first:
            path = kept.open(identity)
            found = unfinished.read(path)
    finished = distributed.broadcast(found)
    if finished and first:
        print(f"found {len(finished)} finished level(s) of seeds {seeds[0]} to {seeds[-1]}, going on from there")
    parts = list(finished)
    with _Bars() as bars:
        progress = bars if first else None
        for videos in sampler.parts(seeds, **conditions(subjects), progress=progress, finished=finished):
            parts.append(videos.cpu())
            if not parts[-1].isfinite().all():
                raise FloatingPointError(
                    f"the videos of level {len(parts) - 1} hold numbers that are not finite; lower --guidance or take "
                    "other weights"
                )
            if first:
                unfinished.write(path, parts)
    return parts


def _stem(subject: Subject, seed: int) -> str:
    return f"{subject.stem}_seed{seed}"


class _Outputs:
    """Writes the files of one call of the command, on rank 0."""

    def __init__(self, options: SampleOptions, loaded: Run, real: list[Tensor]) -> None:
        self.options, self.config, self.real = options, loaded.config, real
        self.paths: list[Path] = []
        self.sheet: list[Tensor] = []
        self.captions: list[str] = []
        self.seams: dict[str, list[dict[str, float]]] = {}

    def write(
        self, seeds: Sequence[int], subjects: Sequence[Subject], parts: dict[str, list[Tensor]],
        samplers: dict[str, Sampler],
    ) -> None:  # fmt: skip
        """Writes the videos of a batch, and collects their rows of the contact sheet and their seam energies."""
        first = seeds[0] - self.options.seed
        for row, (seed, subject) in enumerate(zip(seeds, subjects)):
            if self.real:
                self.sheet.append(self.real[first + row])
                self.captions.append(f"{subject.caption}, real")
            for overlap, videos in parts.items():
                self._write_video(_stem(subject, seed), overlap, [part[row] for part in videos])
                self.captions.append(subject.caption + self._note(overlap))
                self.seams.setdefault(overlap, []).append(samplers[overlap].seams(videos[-1][row]))

    def add_long(
        self, first: int, subjects: Sequence[Subject], paths: Sequence[Path], sheets: Sequence[Tensor]
    ) -> None:
        """Takes note of a batch of long videos that are written, and of their frames for the contact sheet.

        Args:
            first: number of the batch's first video, of all videos.
            subjects: of the batch.
            paths: of its files.
            sheets: uint8 ``[3, columns, H, W]`` each.
        """
        for row, (subject, path, frames) in enumerate(zip(subjects, paths, sheets)):
            if self.real:
                self.sheet.append(self.real[first + row])
                self.captions.append(f"{subject.caption}, real")
            self.paths.append(path)
            self.sheet.append(frames)
            self.captions.append(subject.caption + self._note(""))

    def _write_video(self, stem: str, overlap: str, parts: Sequence[Tensor]) -> None:
        stem += f"_overlap_{overlap}" if self.options.compare_overlap else ""
        frames = to_uint8(parts[-1])
        self.paths.append(self.options.out / f"{stem}.mp4")
        self.sheet.append(frames)
        write_video(self.paths[-1], frames, fps=self.options.fps)
        if self.options.save_levels:
            for level, video in enumerate(parts[:-1]):
                fps = self.options.fps * video.shape[1] / frames.shape[1]  # so that it lasts as long as the video
                write_video(self.options.out / f"{stem}_level{level}.mp4", to_uint8(video), fps=fps)

    def _note(self, overlap: str) -> str:
        if self.options.compare_overlap:
            return f", overlap {overlap}"
        return ", generated" if self.real else ""

    def finish(self, labeled: bool) -> None:
        """Writes the contact sheet."""
        options = self.options
        write_contact_sheet(
            options.out / SHEET,
            self.sheet,
            columns=options.columns,
            labels=self.captions if labeled or self.real or options.compare_overlap else None,
            scale=max(1, SHEET_WIDTH // self.config.resolution[2]),
        )
        if options.compare_overlap:
            print(seam_table(self.seams))


def seam_table(seams: dict[str, list[dict[str, float]]]) -> str:
    """The seam energy of each strategy on each axis, averaged over videos; 1 where tile borders are invisible."""
    lines = [
        f"{'overlap':<10}" + "".join(f"{axis:>8}" for axis in AXES) + "   gradient energy across tile borders / inside"
    ]
    for overlap, videos in seams.items():
        cells = []
        for axis in AXES:
            values = [energies[axis] for energies in videos if axis in energies]
            cells.append(f"{sum(values) / len(values):>8.2f}" if values else f"{'-':>8}")
        lines.append(f"{overlap:<10}" + "".join(cells))
    return "\n".join(lines)


class _Bars:
    """One progress bar per part, each with its own ETA."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.part = -1

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, part: int, done: int, calls: int) -> None:
        if part != self.part:
            if self.bar is not None:
                self.bar.close()
            self.part, self.bar = part, tqdm(total=calls, desc=f"level {part}", unit="call", dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
