"""FVD and Inception score of generated videos, and the protocols that say which clips and frames count.

Published numbers depend on the protocol more than on the model, so the result names the protocol and all its parts.
``stylegan-v`` is that of StyleGAN-V's public code (``universome/stylegan-v``, ``src/metrics``, commit 1f630af),
``paper`` that of HPDM (section 5 and appendix B), by the same authors. They differ in three points:

- real videos for FVD: 2,048 of the set (``stylegan-v``); all of UCF-101's train split, about 9,500 (``paper``);
- generated videos: 2,048 (``stylegan-v``); 10,000 (``paper``). For the paper's Table 6, which also has 2,048, and its
  ablations, which have 512, pass ``--samples``;
- overlap of the tiles: 50 % in space (``paper``, appendix C); StyleGAN-V has no tiles.

Common to both:

- frames of a real video: a window of consecutive frames at a random position; shorter videos are left out;
- frames of a generated video: the first 16, or all 64;
- class of a generated video: that of a random real video, so classes are as frequent as in the set;
- covariance: divided by the number of videos, not by one less;
- Inception score: 10 splits of rows shuffled by ``RandomState(42)``; C3D takes 16 frames, so there is none for 64.

**Readings.** StyleGAN-V's code takes the *first* 2,048 real videos of its set, which in sorted folders belong to a few
classes; here they are drawn at random from the seed. The paper uses StyleGAN-V's metrics, but says neither how windows
are placed nor how covariances are divided; here both follow StyleGAN-V's code. For 16 frames, section 5 says
"subsample", appendix B "the first 16 frames out of the sequence"; here the first 16 are taken. Frames are read as in
the run's training (stride, rate, size).

Features of real videos are in :mod:`hpdm.evaluation.real_statistics`. Ranks share the clips, real and generated; their
features are gathered in the order of the clips.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpdm import distributed
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.metrics import FeatureStatistics, frechet_distance, inception_score
from hpdm.evaluation.real_statistics import RealStatistics

logger = logging.getLogger(__name__)

ProtocolName = Literal["stylegan-v", "paper"]
SPLITS = 10
SHUFFLE_SEED = 42
CLASSIFIER_FRAMES = 16
"""Frames that C3D takes."""


@dataclass(frozen=True)
class Protocol:
    """The numbers in which protocols differ."""

    real: int | None
    """Real videos, at most the set's; ``None`` for all."""
    generated: int
    overlap: str | None
    """Axes on which tiles overlap while sampling, unless others are asked for; ``None`` for the sampler's default."""


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "stylegan-v": Protocol(real=2048, generated=2048, overlap=None),
    # Appendix C: "spatial 50% patch overlapping to compute the metrics".
    "paper": Protocol(real=None, generated=10_000, overlap="hw"),
}


class RealFeatures(NamedTuple):
    """What FVD compares generated videos with."""

    detector: Detector
    statistics: RealStatistics
    """Statistics of the same detector's features on real clips."""


def draw_labels(labels: Sequence[int] | None, count: int, seed: int) -> list[int] | None:
    """Classes of ``count`` videos to generate, each that of a random clip of the set, as in StyleGAN-V.

    Args:
        labels: label of each clip of the set; ``None`` for a set without classes.
        count: number of videos; a larger number begins with the same classes.
        seed: >= 0.
    """
    if labels is None:
        return None
    source = np.random.default_rng([seed, 1])
    return [labels[int(source.integers(len(labels)))] for _ in range(count)]


class DistributionScore:
    """FVD and Inception score of generated videos, which are added one by one.

    Args:
        frames: frames of a video; of a longer one the first.
        batch: videos at a time.
        real: for FVD; ``None`` for no FVD.
        classifier: for the Inception score; ``None`` for no score.
    """

    def __init__(
        self, *, frames: int, batch: int, real: RealFeatures | None = None, classifier: Detector | None = None
    ) -> None:
        self.frames, self.batch, self.real, self.classifier = frames, batch, real, classifier
        self.waiting: list[tuple[int, Tensor]] = []
        self.outputs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # features and probabilities, by number

    def add(self, number: int, video: Tensor) -> None:
        """Adds a video of this rank: its number among the videos of all ranks, and uint8 ``[3, F, H, W]``.

        Raises:
            ValueError: a detector that breaks its contract.
        """
        self.waiting.append((number, video[:, : self.frames]))
        if len(self.waiting) == self.batch:
            self._detect()

    def _detect(self) -> None:
        """Runs the detectors on the videos that wait."""
        if not self.waiting:
            return
        videos = torch.stack([video for _, video in self.waiting])  # [B, 3, frames, H, W]
        empty = np.zeros((len(videos), 0))
        features = empty if self.real is None else self.real.detector(videos).numpy()  # [B, W]
        probabilities = empty if self.classifier is None else self.classifier(videos).numpy()  # [B, K]
        self.outputs |= {n: (features[i], probabilities[i]) for i, (n, _) in enumerate(self.waiting)}
        self.waiting = []

    def result(self) -> dict[str, Any]:
        """The scores of all videos. A collective: all ranks return the same.

        Returns:
            ``generated``, the number of videos; ``frames``; ``fvd``: ``value``, ``real``, ``left_out``, ``features``;
            ``is``: ``mean``, ``std`` over ``splits``.

        Raises:
            ValueError: a detector that breaks its contract, or too few videos.
        """
        self._detect()
        gathered = distributed.gather(self.outputs)
        result: dict[str, Any] = {"generated": len(gathered), "frames": self.frames}
        if self.real is not None:
            result["fvd"] = _fvd(np.stack([features for features, _ in gathered]), self.real)
        if self.classifier is not None:
            probabilities = np.stack([probabilities for _, probabilities in gathered])
            result["is"] = _inception_score(probabilities, self.classifier)
        return result


def _fvd(rows: np.ndarray, real: RealFeatures) -> dict[str, Any]:
    """Frechet distance of the features ``rows [N, W]`` of generated videos from those of real ones."""
    features = FeatureStatistics()
    features.update(rows)
    detector, statistics = real.detector, real.statistics
    for name, stats in (("real", statistics.features), ("generated", features)):
        if stats.count <= stats.width:
            logger.warning(
                "fvd: %d %s videos give a covariance of rank %d for %d features: FVD is biased upwards; compare it "
                "only with values of as many videos",
                stats.count, name, stats.count - 1, stats.width,
            )  # fmt: skip
    means_and_covariances = [
        array for s in (features, statistics.features) for array in (s.mean, s.covariance(unbiased=False))
    ]
    return {
        "value": frechet_distance(*means_and_covariances),
        "real": statistics.features.count,
        "left_out": statistics.left_out,
        "features": features.width,
        "detector": {"file": str(detector.path), "sha256": detector.sha256},
    }


def _inception_score(probabilities: np.ndarray, classifier: Detector) -> dict[str, Any]:
    """Inception score of ``probabilities [N, K]``, with the settings that it depends on."""
    mean, std = inception_score(probabilities, SPLITS, shuffle=SHUFFLE_SEED)
    return {
        "mean": mean,
        "std": std,
        "splits": SPLITS,
        "classes": classifier.width,
        "classifier": {"file": str(classifier.path), "sha256": classifier.sha256},
    }


def distribution_lines(result: dict[str, Any]) -> str:
    """The scores and the settings that they depend on, as text."""
    lines = []
    if "fvd" in result:
        fvd = result["fvd"]
        left_out = f", {fvd['left_out']} left out" if fvd["left_out"] else ""
        lines.append(
            f"FVD {fvd['value']:.6g}: {result['generated']} generated against {fvd['real']} real videos{left_out}"
        )
        lines.append(f"  detector {_file(fvd['detector'])}, {fvd['features']} features")
    if "is" in result:
        score = result["is"]
        lines.append(
            f"Inception score {score['mean']:.2f} +- {score['std']:.2f} over {score['splits']} splits: "
            f"{result['generated']} generated videos"
        )
        lines.append(f"  classifier {_file(score['classifier'])}, {score['classes']} classes")
    return "\n".join(lines)


def _file(file: dict[str, str]) -> str:
    return f"{file['file']} (sha256 {file['sha256']})"
