"""Motion where the windows of a long video meet, and inside of them, in windows of the same length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hpdm.evaluation.synthetic_score import fit_motion

CLIP = 16
"""Frames of a clip that is measured."""
_SHORTEST = 6  # frames: two unknowns per axis are fitted


@dataclass(frozen=True)
class BorderWindows:
    """Where motion is measured around borders and between them."""

    frames: int
    """Of every window; 0 if borders are too near to each other to have any between them."""
    at_borders: list[range]
    """Centered on a border each, which is the only one that it crosses."""
    inside: list[range]
    """In the middle between two borders each."""

    @classmethod
    def of(cls, borders: Sequence[int], frames: int) -> BorderWindows:
        """The windows of a video of so many frames.

        Args:
            borders: the frames with which a window begins to be new, but for the first; ascending.
            frames: of the video.
        """
        edges = [0, *borders, frames]
        spacing = min((after - before for before, after in pairwise(edges[:-1])), default=0)
        length = min(CLIP, spacing) // 2 * 2
        if length < _SHORTEST:
            return cls(0, [], [])
        centers = [b for b in borders if length // 2 <= b <= frames - length // 2]
        starts = [(low + high - length) // 2 for low, high in pairwise(edges) if high - low >= length]
        return cls(
            length,
            [range(b - length // 2, b + length // 2) for b in centers],
            [range(start, start + length) for start in starts],
        )


class WindowMotion(NamedTuple):
    """The motion in one window."""

    residual: float  # pixels, root mean square distance from the best straight, bouncing motion
    speed: float  # pixels per frame of the file


def motion_in(
    windows: Sequence[range], position: np.ndarray, radius: np.ndarray, steps: np.ndarray, size: tuple[int, int]
) -> list[WindowMotion]:
    """The motions in those windows that have an object in at least three quarters of their frames.

    Args:
        windows: numbers of frames.
        position: float64 ``[F, 2]``, (x, y) in pixels in every frame; NaN without an object.
        radius: float64 ``[F]``, pixels.
        steps: ``[F]``, the frames' numbers in the rendered file.
        size: (height, width) of the picture.
    """
    motions = []
    for window in windows:
        frames = np.array([t for t in window if np.isfinite(position[t]).all()])
        if len(frames) < 0.75 * len(window):
            continue
        times = (steps[frames] - steps[window[0]]).astype(np.float64)
        motion = fit_motion(position[frames], times, float(np.median(radius[frames])), size)
        motions.append(WindowMotion(motion.residual, motion.speed))
    return motions
