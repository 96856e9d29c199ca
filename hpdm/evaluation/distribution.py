"""FVD and Inception score of generated videos: which clips, which frames, how many.

Published numbers differ by protocol more than by model, so a protocol is named and all its parts are in the result.
``stylegan-v`` is that of StyleGAN-V's public code (``universome/stylegan-v``, ``src/metrics``, commit 1f630af),
``paper`` that of HPDM (section 5 and appendix B), by the same authors. They differ in two numbers:

- real videos for FVD: 2,048 of the set (``stylegan-v``); all of UCF-101's train split, about 9,500 (``paper``);
- generated videos: 2,048; 10,000 (the paper's Table 6 has 2,048 too, its ablations 512: ``--samples``).

Common to both:

- frames of a real video: consecutive ones at a random place; shorter videos are left out;
- frames of a generated video: the first 16, or all 64;
- class of a generated video: that of a real video drawn at random, so classes are as frequent as in the set;
- covariance: divided by the number of videos, not by one less;
- Inception score: 10 splits of rows shuffled by ``RandomState(42)``; C3D takes 16 frames, so there is none for 64.

**readings.** The code takes the *first* 2,048 real videos of its set, which in sorted folders are those of some
classes alone; here they are drawn at random from the seed. The paper names StyleGAN-V's metrics, not how windows are
placed or covariances divided, so its authors' code stands in. Of 16 frames section 5 says "subsample", appendix B "the
first 16 frames out of the sequence": the first. Frames are as the run's training reads them (stride, rate, size).

Several processes share the clips out, real and generated; their features meet in the order of the clips.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hpdm import distributed
from hpdm.data.clips import VideoDataset
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.metrics import FeatureStatistics, frechet_distance, inception_score
from hpdm.files import atomic_path

T = TypeVar("T")

logger = logging.getLogger(__name__)

ProtocolName = Literal["stylegan-v", "paper"]
SPLITS = 10
SHUFFLE = 42
CLASSIFIER_FRAMES = 16
"""Frames that C3D takes."""

_FORMAT = 1


@dataclass(frozen=True)
class Protocol:
    """The numbers in which protocols differ."""

    real: int | None
    """Real videos, at most the set's; ``None`` for all."""
    generated: int


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "stylegan-v": Protocol(real=2048, generated=2048),
    "paper": Protocol(real=None, generated=10_000),
}


class RealStatistics(NamedTuple):
    """Features of real clips."""

    features: FeatureStatistics
    left_out: int  # clips that were too short or damaged


def draw_labels(labels: Sequence[int] | None, count: int, seed: int) -> list[int] | None:
    """Classes of ``count`` videos to generate: each that of a clip of the set drawn at random (StyleGAN-V's way).

    Args:
        labels: of the clips of the set; ``None`` for a set without classes.
        count: number of videos; more of them begin with the same.
        seed: >= 0.
    """
    if labels is None:
        return None
    source = np.random.default_rng([seed, 1])
    return [labels[int(source.integers(len(labels)))] for _ in range(count)]


def real_statistics(
    dataset: VideoDataset, detector: Detector, *, count: int | None, batch: int, folder: Path | None = None
) -> RealStatistics:
    """Features of windows at random places of clips drawn at random, each clip once. The same in every process.

    Args:
        dataset: with ``train=True`` (random windows, from its seed) and ``short="skip"``.
        detector: of features.
        count: clips to use, at most as many as are good; ``None`` for all.
        batch: clips at a time.
        folder: where statistics are kept for the next call with the same clips, windows and detector.

    Raises:
        ValueError: a damaged file of statistics, or under two good clips.
        DecodeError: no clip is long enough.
    """
    identity = _identity(dataset, detector, count)
    path = None if folder is None else folder / f"real-{_digest(identity)[:16]}.npz"
    kept = None
    with distributed.raise_on_all_ranks():
        if path is not None and distributed.is_first() and path.is_file():
            logger.info("features of real clips from %s", path)
            kept = _read(path, identity)
    kept = distributed.broadcast(kept)
    if kept is not None:
        return kept
    wanted = len(dataset) if count is None else min(count, len(dataset))
    features = FeatureStatistics()
    order = np.random.default_rng([dataset.seed, 0]).permutation(len(dataset)).tolist()
    with tqdm(
        total=wanted, desc="real clips", unit="clip", dynamic_ncols=True, disable=not distributed.is_first()
    ) as bar:
        while order and features.count < wanted:
            # A round: as many clips as are still missing, but no more than a batch for each process.
            taken = min(wanted - features.count, batch * distributed.world_size())
            batches = [order[first : min(first + batch, taken)] for first in range(0, taken, batch)]
            order = order[taken:]
            numbers = distributed.shard(range(len(batches)))
            with distributed.raise_on_all_ranks():
                mine = {n: _features_of(dataset, batches[n], detector) for n in numbers}
            for rows in distributed.gather(mine):
                if len(rows):
                    features.update(rows)
                    bar.update(len(rows))
    if features.count < 2:
        raise ValueError(
            f"data: {dataset.root} has {features.count} good clip(s) of {dataset.frames} frames, expected >= 2"
        )
    found = RealStatistics(features, left_out=len(dataset) - len(order) - features.count)
    with distributed.raise_on_all_ranks():
        if path is not None and distributed.is_first():
            _write(path, identity, found)
    return found


def _features_of(dataset: VideoDataset, indices: Sequence[int], detector: Detector) -> np.ndarray:
    """``[good clips, W]``. In place of a clip that is too short or damaged the dataset gives another one, which is left
    to its own turn.
    """
    items = [dataset[index] for index in indices]
    clips = [item["video"] for item, index in zip(items, indices) if item["path"] == dataset.files[index].path]
    return detector(torch.stack(clips)).numpy() if clips else np.zeros((0, 0))


def evaluate_distribution(
    generated: Iterable[tuple[int, Tensor]],
    *,
    frames: int,
    batch: int,
    detector: Detector | None = None,
    real: RealStatistics | None = None,
    classifier: Detector | None = None,
) -> dict[str, Any]:
    """FVD and Inception score of generated videos, each of which is looked at once. The same in every process.

    Args:
        generated: this process's, taken a batch at a time: each its number among those of all processes and uint8
            ``[3, F, H, W]`` with ``F >= frames``, of which the first ``frames`` count.
        frames: frames of a video.
        batch: videos at a time.
        detector, real: for FVD, a detector and the features of real clips from the same.
        classifier: for the Inception score.

    Returns:
        ``generated``, the number of videos; ``fvd``: ``value``, ``real``, ``left_out``, ``features``; ``is``: ``mean``,
        ``std`` over ``splits``.

    Raises:
        ValueError: a detector that breaks its contract, or too few videos.
    """
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    nothing = np.zeros((batch, 0))
    for some in _batches(generated, batch):
        videos = torch.stack([clip[:, :frames] for _, clip in some])
        found = nothing if detector is None else detector(videos).numpy()
        guessed = nothing if classifier is None else classifier(videos).numpy()
        rows |= {number: (found[i], guessed[i]) for i, (number, _) in enumerate(some)}
    made = distributed.gather(rows)
    result: dict[str, Any] = {"generated": len(made), "frames": frames}
    if detector is not None and real is not None:
        features = FeatureStatistics()
        features.update(np.stack([found for found, _ in made]))
        for name, stats in (("real", real.features), ("generated", features)):
            if stats.count <= stats.width:
                logger.warning(
                    "fvd: %d %s videos give a covariance of rank %d for %d features: FVD is biased upwards; compare it "
                    "only with values of as many videos",
                    stats.count, name, stats.count - 1, stats.width,
                )  # fmt: skip
        pairs = ((s.mean, s.covariance(unbiased=False)) for s in (features, real.features))
        value = frechet_distance(*next(pairs), *next(pairs))
        result["fvd"] = {
            "value": value,
            "real": real.features.count,
            "left_out": real.left_out,
            "features": features.width,
            "detector": {"file": str(detector.path), "sha256": detector.sha256},
        }
    if classifier is not None:
        mean, std = inception_score(np.stack([guessed for _, guessed in made]), SPLITS, shuffle=SHUFFLE)
        result["is"] = {
            "mean": mean,
            "std": std,
            "splits": SPLITS,
            "classes": classifier.width,
            "classifier": {"file": str(classifier.path), "sha256": classifier.sha256},
        }
    return result


def distribution_lines(result: dict[str, Any]) -> str:
    """What was found, with all that it depends on."""
    lines = []
    if "fvd" in result:
        fvd = result["fvd"]
        short = f", {fvd['left_out']} left out" if fvd["left_out"] else ""
        lines.append(
            f"FVD {fvd['value']:.6g}: {result['generated']} generated against {fvd['real']} real videos{short}"
        )
        lines.append(f"  detector {_named(fvd['detector'])}, {fvd['features']} features")
    if "is" in result:
        score = result["is"]
        lines.append(
            f"Inception score {score['mean']:.2f} +- {score['std']:.2f} over {score['splits']} splits: "
            f"{result['generated']} generated videos"
        )
        lines.append(f"  classifier {_named(score['classifier'])}, {score['classes']} classes")
    return "\n".join(lines)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    source = iter(items)
    while batch := list(islice(source, size)):
        yield batch


def _named(file: dict[str, str]) -> str:
    return f"{file['file']} (sha256 {file['sha256']})"


def _identity(dataset: VideoDataset, detector: Detector, count: int | None) -> dict[str, Any]:
    """All that the features of real clips depend on. Clips are known by place in the set and size in bytes."""
    files = hashlib.sha256()
    for file in dataset.files:
        size = Path(file.source).stat().st_size if isinstance(file.source, str) else file.source.size
        name = Path(file.path)
        files.update(f"{name.parent.name}/{name.name} {size}\n".encode())
    return {
        "format": _FORMAT,
        "clips": len(dataset),
        "files": files.hexdigest(),
        "frames": dataset.frames,
        "size": list(dataset.size),
        "stride": dataset.stride,
        "fps": dataset.fps,
        "seed": dataset.seed,
        "count": count,
        "detector": detector.sha256,
    }


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _write(path: Path, identity: dict[str, Any], found: RealStatistics) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = found.features
    with atomic_path(path) as temporary:
        np.savez(
            temporary,
            identity=np.array(json.dumps(identity)),
            count=features.count,
            left_out=found.left_out,
            mean=features.mean,
            covariance=features.covariance(unbiased=False),
        )


def _read(path: Path, identity: dict[str, Any]) -> RealStatistics:
    try:
        with np.load(path, allow_pickle=False) as file:
            kept = json.loads(str(file["identity"]))
            features = FeatureStatistics.of(int(file["count"]), file["mean"], file["covariance"])
            left_out = int(file["left_out"])
    except Exception as error:  # numpy answers damage with errors of many kinds
        raise ValueError(f"statistics: {path} is damaged ({type(error).__name__}: {error}); delete it") from None
    if kept != identity:
        raise ValueError(f"statistics: {path} is of other clips or another detector; delete it")
    return RealStatistics(features, left_out)
