"""``hpdm evaluate``: measures the quality of a run. The metrics are in :mod:`hpdm.evaluation`.

Under ``torchrun`` the ranks share the clips, and rank 0 reports.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hpdm import distributed, runs
from hpdm.commands.common import warn_of_untrained_context
from hpdm.commands.evaluate_options import OF_VIDEOS, EvaluateOptions
from hpdm.commands.evaluate_over_time import check_over_time, over_time
from hpdm.commands.evaluate_videos import distribution, motion
from hpdm.data.clips import VideoDataset
from hpdm.data.layout import find_split_file
from hpdm.evaluation.denoising import denoising_table, evaluate_denoising
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import distribution_lines
from hpdm.evaluation.levels import levels_of
from hpdm.evaluation.motion import motion_table, read_synthetic_set
from hpdm.evaluation.over_time.report import over_time_table, plot_over_time
from hpdm.evaluation.protocols import PROTOCOLS
from hpdm.evaluation.reconstruction import evaluate_reconstruction, reconstruction_table
from hpdm.files import write_json
from hpdm.runs import Run
from hpdm.text import EmbeddingStore


def run(options: EvaluateOptions) -> int:
    """The command ``hpdm evaluate``; returns the exit status."""
    with distributed.process_group(distributed.pick_device(options.device)):
        result = evaluate(options)
        if distributed.is_first():
            print("\n".join(report_lines(options, result)))
            if options.json is not None:
                write_json(options.json, result)
            if options.over_time.plot is not None:
                plot_over_time(result["over_time"], options.over_time.plot)
    return 0


def report_lines(options: EvaluateOptions, result: dict[str, Any]) -> list[str]:
    """The result of :func:`evaluate` as lines for a terminal."""
    split = options.split or "none"
    lines = [f"step {result['step']} of {options.run_folder} ({options.weights}), {options.data}, split {split}"]
    if "denoising" in options.metrics:
        lines += [f"{result['measured']}, {result['clips']} clips, context {options.context}"]
        lines += [denoising_table(result)]
    if "reconstruction" in result:
        part = result["reconstruction"]
        coded = "whole" if part["chunk"] is None else f"in chunks of {part['chunk']} latents"
        coded += "" if part["tile"] is None else f", in tiles of {part['tile'][0]}x{part['tile'][1]} latents"
        lines += [f"{part['clips']} clips of {part['frames']} frames, coded {coded}", reconstruction_table(part)]
    if "over_time" in result:
        lines += [over_time_table(result["over_time"])]
    for part in result.get("levels", [result]):
        if "level" in part:
            lines.append(f"level {part['level']}, {'x'.join(map(str, part['size']))}")
        if "motion" in part:
            lines.append(motion_table(part["motion"]))
        if "distribution" in part:
            scores = part["distribution"]
            lines += [
                distribution_lines(scores),
                f"  protocol {options.protocol}, first {scores['frames']} of {scores['frames_generated']} "
                f"frames at {'x'.join(map(str, scores['size']))}, seed {options.seed}",
            ]
        for metric in ("motion", "distribution"):
            if seams := part.get(metric, {}).get("seams"):
                energies = ", ".join(f"{axis} {energy:.3f}" for axis, energy in seams.items())
                lines.append(f"gradient energy across tile borders / inside: {energies}")
                break
    return lines


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Runs the evaluation. A collective: every rank calls it and gets the same result.

    Returns:
        ``step``; with the metric denoising what :func:`hpdm.evaluation.denoising.evaluate_denoising` returns; with
        motion ``motion``, see :meth:`hpdm.evaluation.motion.MotionScore.result`, with fvd, kvd or is ``distribution``,
        see :meth:`hpdm.evaluation.distribution.DistributionScore.result`; with reconstruction ``reconstruction``, see
        :func:`hpdm.evaluation.reconstruction.evaluate_reconstruction`. With ``options.level`` ``motion`` and
        ``distribution`` are in ``levels``, a list of a dictionary per level, with ``level`` and ``size`` (frames,
        height, width).

    Raises:
        FileNotFoundError: no such run, data, split or detector.
        ValueError: the data has other classes than the run, or something that a metric needs is missing.
        RuntimeError: another rank failed before the work began.
    """
    with distributed.process_group(distributed.pick_device(options.device)) as device:
        distributed.assert_same_on_all_ranks("options", asdict(options))
        with distributed.raise_on_all_ranks():
            loaded = runs.load(options.run_folder, kernels=options.kernels, device=device, weights=options.weights)
        return evaluate_run(options, loaded)


def evaluate_run(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """:func:`evaluate` of a run that is loaded already, with the weights that the options name. A collective."""
    with distributed.raise_on_all_ranks():
        check_run(options, loaded)
    result: dict[str, Any] = {"step": loaded.step}
    if "denoising" in options.metrics:
        result |= _denoising(options, loaded)
    if "reconstruction" in options.metrics:
        result["reconstruction"] = evaluate_reconstruction(
            loaded, _clips_to_reconstruct(options, loaded), clips=options.clips, batch=options.batch,
            chunk=options.reconstruction.chunk, tile=options.reconstruction.tile,
            overlap=options.reconstruction.tile_overlap,
        )  # fmt: skip
    levels = levels_of(loaded.system, loaded.config, options.level)
    parts: list[dict[str, Any]] = [{"level": level.number, "size": list(level.size)} for level in levels]
    if options.over_time.frames is not None:
        result["over_time"] = over_time(options, loaded)
    elif "motion" in options.metrics:
        for part, scores in zip(parts, motion(options, loaded, levels)):
            part["motion"] = scores
    if options.of_clips:
        for part, scores in zip(parts, distribution(options, loaded, levels)):
            part["distribution"] = scores
    if options.level:
        return result | {"levels": parts}
    return result | {name: value for name, value in parts[0].items() if name in ("motion", "distribution")}


def check_run(options: EvaluateOptions, loaded: Run) -> None:
    """Checks run, data and detectors before the long work begins; raises as :func:`evaluate`. It needs no weights."""
    kind, metrics, frames = loaded.config.conditioning, set(options.metrics), loaded.config.resolution[0]
    if not loaded.system.generates and metrics != {"reconstruction"}:
        others = ", ".join(metric for metric in options.metrics if metric != "reconstruction")
        raise ValueError(f"metrics: got {others} for a run of an autoencoder, expected reconstruction alone")
    if "reconstruction" in metrics:
        loaded.system.compression(loaded.config)
        _clips_to_reconstruct(options, loaded)
    dataset = options.open_clips(loaded)
    if "denoising" in metrics and (kind == "text") != (options.embeddings is not None):
        expected = "the folder that `hpdm data embed` wrote" if kind == "text" else "none"
        raise ValueError(
            f"embeddings: got {options.embeddings or 'none'}, expected {expected} for conditioning={kind!r}"
        )
    if metrics & OF_VIDEOS and options.generated is None and kind == "text":
        raise ValueError(
            "run: it is conditioned on text, expected --generated, a folder of videos that `hpdm sample --prompts` "
            "wrote"
        )
    if options.detector is not None:
        Detector(options.detector, "features")
    if options.classifier is not None:
        Detector(options.classifier, "classes")
    levels_of(loaded.system, loaded.config, options.level)
    count = len(loaded.system.part_sizes(loaded.config))
    if options.given_levels >= count:
        raise ValueError(
            f"given_levels: got {options.given_levels}, expected 0 to {count - 1} for a run of {count} level(s)"
        )
    if "motion" in metrics:
        read_synthetic_set(dataset)
        if options.over_time.frames is None and kind != "class":
            raise ValueError(f"run: got a run with conditioning {kind!r}, expected 'class' for motion")
    if options.over_time.frames is not None:
        check_over_time(options, loaded)
    if metrics & OF_VIDEOS and options.generated is None:
        warn_of_untrained_context(loaded, options.sampler)
    if options.of_clips and options.frames > frames:
        raise ValueError(f"frames: got {options.frames}, expected at most {frames}, the frames of the run")
    if options.distances and PROTOCOLS[options.protocol].split and options.split is None and _has_split(dataset):
        raise ValueError(f"split: got none, but {options.data} has split lists: expected train (published) or test")


def _has_split(dataset: VideoDataset) -> bool:
    try:
        find_split_file(dataset.root, "train", 1)
    except FileNotFoundError:
        return False
    return True


def _clips_to_reconstruct(options: EvaluateOptions, loaded: Run) -> VideoDataset:
    """The clips of the metric reconstruction, of the run's length or another one."""
    frames = options.reconstruction.clip_frames
    return options.open_clips(loaded, **({} if frames is None else {"frames": frames}))


def _denoising(options: EvaluateOptions, loaded: Run) -> dict[str, Any]:
    """The metric denoising."""
    store = None
    if options.embeddings is not None:
        store = EmbeddingStore(options.embeddings, loaded.config.text_width)
    return evaluate_denoising(
        loaded,
        options.open_clips(loaded, captions=store is not None),
        clips=options.clips,
        bins=options.bins,
        batch=options.batch,
        seed=options.seed,
        context=options.context,
        context_noise=options.sampler.context_noise if options.context == "clean" else 0.0,
        embeddings=store,
    )
