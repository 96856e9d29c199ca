"""What the measurements of many videos say together: curves, drift along time, and the borders of windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpdm.evaluation.over_time.borders import CLIP, BorderWindows, WindowMotion
from hpdm.evaluation.over_time.video import MEANING, Track

_PER = 100  # frames of a slope


def times_of(clips: int) -> np.ndarray:
    """The middles of consecutive clips from frame 0, in frames, float64 ``[clips]``."""
    return CLIP * np.arange(clips) + (CLIP - 1) / 2


def summarize(tracks: Sequence[Track], windows: BorderWindows) -> dict[str, Any]:
    """Summarizes the measurements of videos of one length.

    Means and standard errors are over videos; they are ``None`` where no video has a value, errors also where one
    alone has.

    Args:
        tracks: of the videos, at least one.
        windows: where they were measured around borders and between them.

    Returns:
        ``videos``: their number. ``curves`` and ``curve_errors``: by the keys of
        :data:`hpdm.evaluation.over_time.video.MEANING` a list with the mean of every clip, and its standard error.
        ``summary``: by the same keys ``first`` and ``last``, the means of the first and of the last clip that have a
        value, ``slope``, the mean slope of least squares per 100 frames, and ``slope_error``. ``borders``: see
        :func:`summarize_borders`.
    """
    curves: dict[str, list[float | None]] = {}
    errors: dict[str, list[float | None]] = {}
    summary = {}
    for name in MEANING:
        values = np.stack([track.curves[name] for track in tracks])  # [videos, clips]
        curves[name], errors[name] = ([f(of_clip) for of_clip in values.T] for f in (mean, standard_error))
        means = [value for value in curves[name] if value is not None]
        slopes = np.array([slope(of_video) for of_video in values])
        summary[name] = {
            "first": means[0] if means else None,
            "last": means[-1] if means else None,
            "slope": mean(slopes),
            "slope_error": standard_error(slopes),
        }
    return {
        "videos": len(tracks),
        "curves": curves,
        "curve_errors": errors,
        "summary": summary,
        "borders": summarize_borders(tracks, windows),
    }


def summarize_borders(tracks: Sequence[Track], windows: BorderWindows) -> dict[str, Any]:
    """Motion at the borders of windows beside that inside of windows.

    Returns:
        ``frames``: of the windows in which motion is measured. ``at_borders`` and ``inside``: mean ``residual`` and
        ``speed``, and the number of windows that have an object, ``windows``. ``residual_ratio``: at borders over
        inside, with its standard error over videos, ``residual_ratio_error`` (jackknife). ``seam``: energy of the
        change across borders over that elsewhere, the mean of the videos, with ``seam_error``.
    """

    def ratio(some: Sequence[Track]) -> float | None:
        border, inside = (mean([w.residual for w in side]) for side in _sides(some))
        return None if border is None or inside is None else border / max(inside, 1e-9)

    seams = np.array([track.seam for track in tracks])
    at_borders, inside = _sides(tracks)
    return {
        "frames": windows.frames,
        "at_borders": _mean_motion(at_borders),
        "inside": _mean_motion(inside),
        "residual_ratio": ratio(tracks),
        "residual_ratio_error": jackknife_error(ratio, tracks),
        "seam": mean(seams),
        "seam_error": standard_error(seams),
    }


def slope(values: np.ndarray) -> float:
    """The slope of the values ``[clips]`` of consecutive clips per 100 frames, by least squares.

    NaN are left out; NaN with fewer than two values.
    """
    known = np.isfinite(values)
    if known.sum() < 2:
        return math.nan
    times = times_of(len(values))[known]
    centered = times - times.mean()
    return float(_PER * (centered @ values[known]) / (centered @ centered))


def mean(values: np.ndarray | Sequence[float]) -> float | None:
    """The mean of the finite values; ``None`` without any."""
    known = _finite(values)
    return float(known.mean()) if len(known) else None


def standard_error(values: np.ndarray | Sequence[float]) -> float | None:
    """The standard error of the mean of the finite values; ``None`` with fewer than two."""
    known = _finite(values)
    return float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else None


def jackknife_error(value: Callable[[Sequence[Track]], float | None], tracks: Sequence[Track]) -> float | None:
    """The standard error of a value of many videos, from its values without one video each."""
    left_out = [value([*tracks[:n], *tracks[n + 1 :]]) for n in range(len(tracks))]
    known = np.array([v for v in left_out if v is not None])
    if len(known) < 2:
        return None
    return float(math.sqrt((len(known) - 1) * known.var()))


def _finite(values: np.ndarray | Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    return array[np.isfinite(array)]


def _sides(tracks: Sequence[Track]) -> tuple[list[WindowMotion], list[WindowMotion]]:
    """All windows at borders and all inside."""
    return [w for t in tracks for w in t.at_borders], [w for t in tracks for w in t.inside]


def _mean_motion(windows: Sequence[WindowMotion]) -> dict[str, float | int | None]:
    return {
        "windows": len(windows),
        "residual": mean([w.residual for w in windows]),
        "speed": mean([w.speed for w in windows]),
    }
