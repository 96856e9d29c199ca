"""FVD and KVD along time: clips of long videos against real clips, and against the videos' own first clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpdm.evaluation.feature_distances import (
    Distance,
    RealFeatures,
    deviation,
    distance_values,
    frechet,
    statistics_of,
    warn_of_few,
)
from hpdm.evaluation.kernel_distance import polynomial_mmd
from hpdm.evaluation.over_time.summary import slope


def distances_to_real(features: np.ndarray, real: RealFeatures) -> dict[Distance, dict[str, Any]]:
    """Distances of the n-th clips of all videos from real clips, for every n (LVDM's FVD_1024).

    Args:
        features: ``[N, clips, W]``, N >= 2.
        real: of clips of as many frames, from anywhere in real videos.

    Returns:
        For each of ``real.distances``: ``values``, a number per clip, the mean over the draws of real clips; ``draws``,
        that of each draw; ``std``, their standard deviation, ``None`` for one draw; ``first``, ``last`` and ``slope``
        per 100 frames of ``values``.
    """
    if "fvd" in real.distances:
        smallest = min(draw.features.count for draw in real.draws)
        warn_of_few({"real": smallest, "generated": len(features)}, features.shape[2])
    of_clips = [distance_values(features[:, n], real) for n in range(features.shape[1])]
    found: dict[Distance, dict[str, Any]] = {}
    for name in real.distances:
        draws = [of_clip[name] for of_clip in of_clips]  # [clips, draws]
        found[name] = _curve([float(np.mean(values)) for values in draws]) | {
            "draws": [list(values) for values in zip(*draws)],
            "std": [deviation(values) for values in draws] if len(real.draws) > 1 else None,
        }
    return found


def distances_to_start(
    features: np.ndarray, distances: Sequence[Distance], unbiased: bool = False
) -> dict[Distance, dict[str, Any]]:
    """Distances of the n-th clips of all videos from their first ones: drift alone, without any real video.

    The sets are of the same videos, so these values are not comparable with those to real clips. KVD leaves out the
    pairs of clips of one video, and has no bias from that.

    Args:
        features: ``[N, clips, W]``, N >= 2.
        distances: what is measured.
        unbiased: for FVD: divide covariances by the number of videos less one.

    Returns:
        For each of ``distances``: ``values``, a number per clip, zero for the first; ``first``, ``last``, ``slope``.
    """
    clips = [features[:, n] for n in range(features.shape[1])]
    found: dict[Distance, dict[str, Any]] = {}
    for name in distances:
        if name == "fvd":
            statistics = [statistics_of(clip) for clip in clips]
            values = [frechet(after, statistics[0], unbiased) for after in statistics]
        else:
            values = [polynomial_mmd(clip, clips[0], paired=True) for clip in clips]
        found[name] = _curve(values)
    return found


def _curve(values: Sequence[float]) -> dict[str, Any]:
    return {
        "values": list(values),
        "first": values[0],
        "last": values[-1],
        "slope": slope(np.array(values)),
    }
