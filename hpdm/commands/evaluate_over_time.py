"""The metric motion of ``hpdm evaluate`` along long videos: sampled ones, or files that ``hpdm sample`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.evaluate_videos import sampler_options
from hpdm.data.clips import VideoDataset
from hpdm.evaluation.generated import class_of_file, find_generated
from hpdm.evaluation.motion import read_synthetic_set
from hpdm.evaluation.over_time.report import check_plots
from hpdm.evaluation.over_time.score import compare, measure_tracks
from hpdm.evaluation.over_time.sources import check_file, check_real, read_files, read_real, sample_long
from hpdm.long_video import LongSampler
from hpdm.runs import Run

OVER_TIME_SAMPLES = 24


def over_time(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """Measures generated and real videos along time. A collective.

    Returns:
        What :func:`hpdm.evaluation.over_time.score.compare` returns, and ``origin``: the folder of the videos, or how
        they were sampled.
    """
    frames, sampler = _frames(options), _long_sampler(options, loaded)
    dataset = options.open_clips(loaded, frames=frames)
    steps, borders = dataset.offsets(read_synthetic_set(dataset).fps), sampler.windows.borders(frames)
    labels = _labels(options, loaded)
    if options.generated is not None:
        files = _files(options, options.generated)
        names = None if labels is None else [class_of_file(path, loaded.classes) for path in files]
        count, pieces = len(files), read_files(files, frames)
    else:
        count = options.samples or OVER_TIME_SAMPLES
        names = None if labels is None else [loaded.classes[label] for label in labels]
        pieces = sample_long(sampler, options.seed, labels, count, options.batch, frames)
    generated = measure_tracks(pieces, names, steps, borders)
    indices = _spread(dataset, count)
    real_names = None if labels is None else [dataset.class_names[dataset.files[i].label] for i in indices]
    real = measure_tracks(read_real(dataset, indices), real_names, steps, borders)
    result = compare(real, generated, frames, borders, own_start=labels is None)
    origin: dict[str, Any] = {"long": asdict(options.over_time.long)}
    if options.generated is not None:
        return result | {"origin": origin | {"generated": str(options.generated)}}
    sampled = {"first_seed": options.seed, "sampler": asdict(sampler_options(options, loaded))}
    return result | {"origin": origin | sampled | {"unlabeled": labels is None}}


def check_over_time(options: EvaluateOptions, loaded: Run) -> None:
    """Checks that the videos can be sampled or read, and that real clips are as long.

    Raises:
        ValueError: they are not; the message names the option or the file.
        ImportError: the plot needs a package that is not installed.
    """
    frames, (_, height, width) = _frames(options), loaded.config.resolution
    _long_sampler(options, loaded)
    if options.generated is not None:
        files = _files(options, options.generated)
        for path in files:
            check_file(path, frames, (height, width))
        if _labels(options, loaded) is not None:
            for path in files:
                class_of_file(path, loaded.classes)
        count = len(files)
    else:
        count = options.samples or OVER_TIME_SAMPLES
    dataset = options.open_clips(loaded, frames=frames)
    check_real(dataset, _spread(dataset, count))
    if options.over_time.plot is not None:
        check_plots()


def _frames(options: EvaluateOptions) -> int:
    """The length of the videos; ``ValueError`` if it was not asked for."""
    if options.over_time.frames is None:
        raise ValueError("over_time: got none, expected a number of frames")
    return options.over_time.frames


def _long_sampler(options: EvaluateOptions, loaded: Run) -> LongSampler:
    return loaded.system.long_sampler(loaded.model, sampler_options(options, loaded), options.over_time.long)


def _labels(options: EvaluateOptions, loaded: Run) -> list[int] | None:
    """The classes of the videos to sample, in turn; ``None`` if each is compared with its own first clip."""
    if options.over_time.unlabeled or loaded.config.conditioning != "class":
        return None
    return [i % len(loaded.classes) for i in range(options.samples or OVER_TIME_SAMPLES)]


def _files(options: EvaluateOptions, folder: Path) -> list[Path]:
    return find_generated(folder, options.samples)


def _spread(dataset: VideoDataset, count: int) -> Sequence[int]:
    """``count`` clips, spread evenly over a set; all of it if it has fewer."""
    count = min(count, len(dataset))
    return [n * len(dataset) // count for n in range(count)]
