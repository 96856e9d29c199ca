"""FVD, KVD and Inception score of generated videos. :mod:`hpdm.evaluation.protocols` says which clips and frames count.

Features of real videos are in :mod:`hpdm.evaluation.real_statistics`. Ranks share the clips, real and generated; their
features are gathered in the order of the clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpdm import distributed
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.feature_distances import RealFeatures, distances_of
from hpdm.evaluation.metrics import inception_score

SPLITS = 10
SHUFFLE_SEED = 42
CLASSIFIER_FRAMES = 16
"""Frames that C3D takes."""


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
    """FVD, KVD and Inception score of generated videos, which are added one by one.

    Args:
        frames: frames of a video; of a longer one the first.
        batch: videos at a time.
        real: for FVD and KVD; ``None`` for neither.
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
            ``generated``, the number of videos; ``frames``; ``fvd`` and ``kvd`` as of
            :func:`hpdm.evaluation.feature_distances.distances_of`; ``is``: ``mean``, ``std`` over ``splits``.

        Raises:
            ValueError: a detector that breaks its contract, or too few videos.
        """
        self._detect()
        gathered = distributed.gather(self.outputs)
        result: dict[str, Any] = {"generated": len(gathered), "frames": self.frames}
        if self.real is not None:
            result |= distances_of(np.stack([features for features, _ in gathered]), self.real)
        if self.classifier is not None:
            probabilities = np.stack([probabilities for _, probabilities in gathered])
            result["is"] = _inception_score(probabilities, self.classifier)
        return result


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
    for name in ("fvd", "kvd"):
        if name not in result:
            continue
        score = result[name]
        left_out = f", {score['left_out']} left out" if score["left_out"] else ""
        spread = "" if score["std"] is None else f" +- {score['std']:.3g} over {len(score['values'])} draws"
        lines.append(
            f"{name.upper()} {score['value']:.6g}{spread}: {result['generated']} generated against {score['real']} "
            f"real videos{left_out}"
        )
    score = result.get("fvd") or result.get("kvd")
    if score is not None:
        lines.append(f"  detector {_file(score['detector'])}, {score['features']} features")
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
