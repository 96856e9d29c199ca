"""FVD and KVD: the distances of generated videos from real ones by the features of a detector."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from hpdm.data.clips import VideoDataset
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.kernel_distance import polynomial_mmd
from hpdm.evaluation.levels import Level
from hpdm.evaluation.metrics import FeatureStatistics, frechet_distance
from hpdm.evaluation.real_statistics import RealStatistics, real_statistics

logger = logging.getLogger(__name__)

Distance = Literal["fvd", "kvd"]
"""The Frechet distance of two Gaussians, and the squared maximum mean discrepancy with a polynomial kernel."""


class RealFeatures(NamedTuple):
    """What generated videos are compared with."""

    detector: Detector
    draws: Sequence[RealStatistics]
    """Of the same detector's features on real clips, one for each draw of clips; with their rows for KVD."""
    distances: Sequence[Distance] = ("fvd",)
    """What is measured."""
    unbiased: bool = False
    """For FVD: divide covariances by the number of videos less one."""


def draw_real(
    dataset: VideoDataset,
    detector: Detector,
    *,
    distances: Sequence[Distance],
    draws: int = 1,
    count: int | None,
    batch: int,
    repeat: bool = False,
    unbiased: bool = False,
    folder: Path | None = None,
    level: Level | None = None,
) -> RealFeatures:
    """Features of real clips, drawn ``draws`` times; the other arguments are those of :func:`real_statistics`.

    Raises:
        ValueError, DecodeError: as :func:`real_statistics`. A collective: all ranks return the same.
    """
    statistics = [
        real_statistics(
            dataset, detector, count=count, batch=batch, folder=folder, level=level, draw=draw, repeat=repeat,
            rows="kvd" in distances,
        )
        for draw in range(draws)
    ]  # fmt: skip
    return RealFeatures(detector, statistics, distances, unbiased)


def distances_of(rows: np.ndarray, real: RealFeatures) -> dict[str, Any]:
    """The distances of the features ``rows [N, W]`` of generated videos from those of real ones.

    Returns:
        For each of ``real.distances`` a dictionary. ``value``: the mean over the draws of real clips; ``values``: that
        of each draw; ``std``: their standard deviation, divided by their number, ``None`` for one draw; ``real`` and
        ``left_out``: clips of a draw (the smallest), and those that were not good; ``features``: W; ``detector``; of
        fvd also ``covariance``: what scatters are divided by.

    Raises:
        ValueError: fewer than two rows.
    """
    smallest = min(real.draws, key=lambda draw: draw.features.count)
    if "fvd" in real.distances:
        warn_of_few({"real": smallest.features.count, "generated": len(rows)}, rows.shape[1])
    about = {
        "real": smallest.features.count,
        "left_out": smallest.left_out,
        "features": rows.shape[1],
        "detector": {"file": str(real.detector.path), "sha256": real.detector.sha256},
    }
    found: dict[str, Any] = {
        name: {"value": float(np.mean(values)), "values": values, "std": deviation(values)} | about
        for name, values in distance_values(rows, real).items()
    }
    if "fvd" in found:
        found["fvd"]["covariance"] = divisor(real.unbiased)
    return found


def divisor(unbiased: bool) -> str:
    """What the scatter of n videos is divided by, for reports."""
    return "n - 1" if unbiased else "n"


def distance_values(rows: np.ndarray, real: RealFeatures) -> dict[Distance, list[float]]:
    """Each of ``real.distances`` of ``rows [N, W]`` from every draw of real clips."""
    found: dict[Distance, list[float]] = {}
    if "fvd" in real.distances:
        features = statistics_of(rows)
        found["fvd"] = [frechet(features, draw.features, real.unbiased) for draw in real.draws]
    if "kvd" in real.distances:
        found["kvd"] = [polynomial_mmd(rows, draw.kept_rows()) for draw in real.draws]
    return found


def statistics_of(rows: np.ndarray) -> FeatureStatistics:
    """Mean and covariance of ``rows [N, W]``."""
    features = FeatureStatistics()
    features.update(rows)
    return features


def frechet(a: FeatureStatistics, b: FeatureStatistics, unbiased: bool) -> float:
    """The Frechet distance, with covariances divided by the count, or by one less if ``unbiased``."""
    return frechet_distance(a.mean, a.covariance(unbiased), b.mean, b.covariance(unbiased))


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation, divided by the number of values as in LVDM's code; ``None`` for one value."""
    return float(np.std(values)) if len(values) > 1 else None


def warn_of_few(counts: dict[str, int], width: int) -> None:
    """Warns of FVD from no more videos than features; ``counts`` are the numbers of videos by what they are."""
    for name, count in counts.items():
        if count <= width:
            logger.warning(
                "fvd: %d %s videos give a covariance of rank %d for %d features: FVD is biased upwards; compare it "
                "only with values of as many videos",
                count, name, count - 1, width,
            )  # fmt: skip
