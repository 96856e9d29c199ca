"""The metrics of ``hpdm evaluate`` on videos: those that a run samples, or files that ``hpdm sample`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.sampler_choice import choose_sampler
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import DistributionScore, draw_labels
from hpdm.evaluation.feature_distances import draw_real
from hpdm.evaluation.generated import (
    Clips,
    class_of_file,
    files_of_levels,
    find_generated,
    measure,
    read_generated,
    sample_clips,
)
from hpdm.evaluation.given import GivenLevels
from hpdm.evaluation.levels import Level, levels_of
from hpdm.evaluation.motion import MotionScore
from hpdm.evaluation.protocols import PROTOCOLS
from hpdm.evaluation.seams import SeamScore
from hpdm.runs import Run
from hpdm.sampling import SamplerOptions

MOTION_SAMPLES = 96


def motion(options: EvaluateOptions, loaded: Run, levels: Sequence[Level]) -> list[dict[str, Any]]:
    """The metric motion on each level, with the origin of the videos."""
    dataset, names, seams = options.open_clips(loaded), loaded.classes, None
    if options.generated is not None:
        files = find_generated(options.generated, options.samples)
        expected = [class_of_file(path, names) for path in files]
        videos = read_generated(files_of_levels(files, levels), levels)
    else:
        labels = [i % len(names) for i in range(options.samples or MOTION_SAMPLES)]
        expected = [names[label] for label in labels]
        videos, seams = _sample(options, loaded, levels, labels, len(labels))
    scores = [
        MotionScore(dataset, expected, real=len(expected), level=None if level.is_last else level) for level in levels
    ]
    results = [score | {"origin": _origin(options, loaded)} for score in measure(videos, scores)]
    return _with_seams(results, levels, seams)


def distribution(options: EvaluateOptions, loaded: Run, levels: Sequence[Level]) -> list[dict[str, Any]]:
    """The metrics fvd, kvd and is on each level, with everything that they depend on."""
    metrics, device, seams, protocol = options.of_clips, loaded.device, None, PROTOCOLS[options.protocol]
    detector = None if options.detector is None else Detector(options.detector, "features", device)
    classifier = None if options.classifier is None else Detector(options.classifier, "classes", device)
    frames = [min(options.frames, level.size[0]) for level in levels]
    windows = [
        options.open_clips(loaded, frames=level.covered(n), train=True, short="skip", seed=options.seed)
        for level, n in zip(levels, frames)
    ]
    if options.generated is not None:
        files = find_generated(options.generated, options.videos)
        videos = read_generated(files_of_levels(files, levels), levels, options.frames)
    else:
        classes = windows[0].labels if loaded.config.conditioning == "class" else None
        labels = draw_labels(classes, options.videos, options.seed)
        videos, seams = _sample(options, loaded, levels, labels, options.videos)
    scores = []
    for level, clips, n in zip(levels, windows, frames):
        real = None
        if detector is not None and metrics & set(options.distances):
            real = draw_real(
                clips,
                detector,
                distances=options.distances,
                draws=options.draws or protocol.draws,
                count=options.real_clips or protocol.real,
                repeat=protocol.repeat,
                unbiased=protocol.unbiased,
                batch=options.batch,
                folder=options.statistics,
                level=None if level.is_last else level,
            )
        only_is = classifier if "is" in metrics else None
        scores.append(DistributionScore(frames=n, batch=options.batch, real=real, classifier=only_is))
    about = {
        "protocol": options.protocol,
        "split": options.split,
        "stride": windows[0].stride,
        "fps": windows[0].fps,
        "seed": options.seed,
        "weights": options.weights,
        "origin": _origin(options, loaded),
    }
    results = [
        score | {"size": list(level.size[1:]), "frames_generated": level.size[0]} | about
        for level, score in zip(levels, measure(videos, scores))
    ]
    return _with_seams(results, levels, seams)


def _with_seams(
    results: list[dict[str, Any]], levels: Sequence[Level], seams: SeamScore | None
) -> list[dict[str, Any]]:
    """``results`` with ``seams`` at the last level of sampled videos. A collective."""
    if seams is None:
        return results
    energies = seams.result()
    return [
        result | {"seams": energies} if level.is_last and energies else result for level, result in zip(levels, results)
    ]


def _sample(
    options: EvaluateOptions, loaded: Run, levels: Sequence[Level], labels: list[int] | None, count: int
) -> tuple[Clips, SeamScore]:
    """Samples videos, with real lower levels where the options want them, and measures their tile borders."""
    sampler = loaded.system.sampler(loaded.model, sampler_options(options, loaded))
    given = None
    if options.given_levels:
        first = levels_of(loaded.system, loaded.config, range(options.given_levels))
        given = GivenLevels(options.open_clips(loaded), first, labels, count)
    seams = SeamScore(sampler, next((n for n, level in enumerate(levels) if level.is_last), None))
    return seams.watch(sample_clips(sampler, options.seed, labels, count, options.batch, levels, given)), seams


def sampler_options(options: EvaluateOptions, loaded: Run) -> SamplerOptions:
    """How to sample: as the options say, else as the protocol or the run suggests."""
    return choose_sampler(loaded, options.sampler, overlap=PROTOCOLS[options.protocol].overlap)


def _origin(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """Where the generated videos come from: a folder, or how they were sampled."""
    if options.generated is not None:
        return {"generated": str(options.generated)}
    origin = {"first_seed": options.seed, "sampler": asdict(sampler_options(options, loaded))}
    if options.given_levels:
        origin |= {"given_levels": options.given_levels, "given_from": str(options.data), "given_split": options.split}
    return origin
