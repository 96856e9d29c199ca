"""The metrics motion, fvd and kvd of ``hpdm evaluate`` along long videos: sampled, or files of ``hpdm sample``."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpdm import distributed
from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.evaluate_videos import sampler_options
from hpdm.data.clips import VideoDataset
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import draw_labels
from hpdm.evaluation.feature_distances import RealFeatures, divisor, draw_real
from hpdm.evaluation.generated import class_of_file, find_generated
from hpdm.evaluation.motion import read_synthetic_set
from hpdm.evaluation.over_time.borders import CLIP
from hpdm.evaluation.over_time.distances import distances_to_real, distances_to_start
from hpdm.evaluation.over_time.features import ClipFeatures
from hpdm.evaluation.over_time.kept_features import KeptFeatures
from hpdm.evaluation.over_time.report import check_plots
from hpdm.evaluation.over_time.score import compare, measure_tracks
from hpdm.evaluation.over_time.sources import Pieces, check_file, check_real, read_files, read_real, sample_long
from hpdm.evaluation.over_time.summary import times_of
from hpdm.evaluation.protocols import PROTOCOLS
from hpdm.long_video import LongSampler
from hpdm.runs import Run

MOTION_SAMPLES = 24
DISTANCE_SAMPLES = 512
"""Videos, and real clips, of fvd and kvd (LVDM, section 4: "among 512 samples")."""


def over_time(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """Measures generated and real videos along time. A collective.

    Returns:
        With the metric motion what :func:`hpdm.evaluation.over_time.score.compare` returns, else its ``frames``,
        ``clip`` and ``times``; with fvd or kvd ``distances``, see :func:`_distances`; ``origin``: the folder of the
        videos, or how they were sampled.
    """
    frames = _frames(options)
    result: dict[str, Any] = {"frames": frames, "clip": CLIP, "times": times_of(frames // CLIP).tolist()}
    real = _real_features(options, loaded) if options.distances else None
    labels, names = _labels(options, loaded) if options.generated is None else None, None
    files = None if options.generated is None else _files(options, options.generated)
    features = None if real is None else _clip_features(options, real.detector, files)
    if files is not None:
        if _labeled(options, loaded) and "motion" in options.metrics:
            names = [class_of_file(path, loaded.classes) for path in files]
        done = {} if features is None or "motion" in options.metrics else features.known
        count, pieces = len(files), read_files(files, frames, skip=done)
    else:
        count = _count(options)
        names = None if labels is None else [loaded.classes[label] for label in labels]
        pieces = sample_long(_long_sampler(options, loaded), options.seed, labels, count, options.batch, frames)
    if features is not None:
        pieces = features.watch(pieces)
    if "motion" in options.metrics:
        result |= _motion(options, loaded, pieces, names, count)
    else:
        deque(pieces, maxlen=0)
    if real is not None and features is not None:
        result["distances"] = _distances(options, features.result(), real)
    origin: dict[str, Any] = {"long": asdict(options.over_time.long)}
    if options.generated is not None:
        return result | {"origin": origin | {"generated": str(options.generated)}}
    sampled = {"first_seed": options.seed, "sampler": asdict(sampler_options(options, loaded))}
    return result | {"origin": origin | sampled | {"unlabeled": labels is None}}


def _motion(
    options: EvaluateOptions,
    loaded: Run,
    pieces: Pieces,
    names: list[str] | None,
    count: int,
) -> dict[str, Any]:
    """The metric motion of the videos ``pieces``, of the classes ``names``, and of real ones."""
    frames, sampler = _frames(options), _long_sampler(options, loaded)
    dataset, borders = options.open_clips(loaded, frames=frames), sampler.windows.borders(frames)
    steps = dataset.offsets(read_synthetic_set(dataset).fps)
    generated = measure_tracks(pieces, names, steps, borders)
    indices = _spread(dataset, count)
    real_names = None if names is None else [dataset.class_names[dataset.files[i].label] for i in indices]
    real = measure_tracks(read_real(dataset, indices), real_names, steps, borders)
    return compare(real, generated, frames, borders, own_start=names is None)


def _real_features(options: EvaluateOptions, loaded: Run) -> RealFeatures:
    """Features of real clips of 16 frames at random places. A collective."""
    if options.detector is None:
        raise ValueError("detector: got none, expected a TorchScript file")
    return draw_real(
        _windows(options, loaded),
        Detector(options.detector, "features", loaded.device),
        distances=options.distances,
        draws=options.draws or 1,
        count=options.real_clips or DISTANCE_SAMPLES,
        repeat=True,
        unbiased=PROTOCOLS[options.protocol].unbiased,
        batch=options.batch,
        folder=options.statistics,
    )


def _clip_features(options: EvaluateOptions, detector: Detector, files: Sequence[Path] | None) -> ClipFeatures:
    """Features of the clips of generated videos; with a folder of statistics those of files are kept. A collective."""
    frames = _frames(options)
    if files is None or options.statistics is None:
        return ClipFeatures(detector, frames, options.batch)
    kept = KeptFeatures(options.statistics, detector, frames // CLIP)
    with distributed.raise_on_all_ranks():
        found = {n: kept.read(files[n]) for n in distributed.shard(range(len(files)))}
    known = {n: rows for n, rows in found.items() if rows is not None}
    return ClipFeatures(detector, frames, options.batch, known, lambda n, rows: kept.write(files[n], rows))


def _distances(options: EvaluateOptions, features: np.ndarray, real: RealFeatures) -> dict[str, Any]:
    """The metrics fvd and kvd of videos with the features ``[N, clips, W]``, with all that they depend on.

    Returns:
        ``videos``; ``real``, clips of a draw (the smallest), and ``left_out``; ``features``: W; ``to_real`` and
        ``to_start``, see :mod:`hpdm.evaluation.over_time.distances`; and the settings.
    """
    smallest = min(real.draws, key=lambda draw: draw.features.count)
    return {
        "videos": len(features),
        "real": smallest.features.count,
        "left_out": smallest.left_out,
        "features": features.shape[2],
        "covariance": divisor(real.unbiased),
        "to_real": distances_to_real(features, real),
        "to_start": distances_to_start(features, real.distances, real.unbiased),
        "detector": {"file": str(real.detector.path), "sha256": real.detector.sha256},
        "protocol": options.protocol,
        "split": options.split,
        "seed": options.seed,
        "weights": options.weights,
    }


def check_over_time(options: EvaluateOptions, loaded: Run) -> None:
    """Checks that the videos can be sampled or read, and that real clips are as long.

    Raises:
        ValueError: they are not; the message names the option or the file.
        ImportError: the plot needs a package that is not installed.
    """
    frames, (_, height, width) = _frames(options), loaded.config.resolution
    if options.generated is None or "motion" in options.metrics:
        _long_sampler(options, loaded)  # which says where windows meet, also of files
    if options.generated is not None:
        files = _files(options, options.generated)
        for path in files:
            check_file(path, frames, (height, width))
        if _labeled(options, loaded) and "motion" in options.metrics:
            for path in files:
                class_of_file(path, loaded.classes)
        if options.distances and len(files) < 2:
            raise ValueError(f"generated: {options.generated} holds 1 video, expected at least 2 for a distance")
        count = len(files)
    else:
        count = _count(options)
    if options.distances:
        _windows(options, loaded)
    if "motion" in options.metrics:
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


def _count(options: EvaluateOptions) -> int:
    """Videos to sample."""
    return options.samples or (DISTANCE_SAMPLES if options.distances else MOTION_SAMPLES)


def _windows(options: EvaluateOptions, loaded: Run) -> VideoDataset:
    """Real clips of 16 frames at random places."""
    return options.open_clips(loaded, frames=CLIP, train=True, short="skip", seed=options.seed)


def _labeled(options: EvaluateOptions, loaded: Run) -> bool:
    """Whether videos have classes; else each is compared with its own first clip."""
    return not options.over_time.unlabeled and loaded.config.conditioning == "class"


def _labels(options: EvaluateOptions, loaded: Run) -> list[int] | None:
    """The classes of the videos to sample: in turn, or for a distance as frequent as in the set; ``None`` for none."""
    if not _labeled(options, loaded):
        return None
    if options.distances:
        return draw_labels(_windows(options, loaded).labels, _count(options), options.seed)
    return [i % len(loaded.classes) for i in range(_count(options))]


def _files(options: EvaluateOptions, folder: Path) -> list[Path]:
    return find_generated(folder, options.samples)


def _spread(dataset: VideoDataset, count: int) -> Sequence[int]:
    """``count`` clips, spread evenly over a set; all of it if it has fewer."""
    count = min(count, len(dataset))
    return [n * len(dataset) // count for n in range(count)]
