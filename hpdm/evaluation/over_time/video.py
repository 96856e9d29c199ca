"""The measurements along one long video, clip by clip, as its frames come. A video is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hpdm.data.synthetic import CLASSES
from hpdm.evaluation.over_time.background import background_error, fit_plane, mean_background
from hpdm.evaluation.over_time.borders import CLIP, BorderWindows, WindowMotion, motion_in
from hpdm.evaluation.over_time.changes import FrameChanges
from hpdm.evaluation.over_time.heading import unexplained_turn
from hpdm.evaluation.synthetic_score import (
    SHOWS_TEXTURE,
    ClipScore,
    Coverage,
    Motion,
    coverage,
    fit_motion,
    levels_apart,
    score_covered,
)
from hpdm.video import as_frames

MEANING = {
    "found": "share of frames with an object; what is measured of objects is so where there is one",
    "shape_right": "share of clips whose object resembles the expected shape most",
    "color_right": "share of clips whose object's color is nearest to the expected one",
    "color_error": "levels of 255 from the expected color",
    "overlap": "intersection over union with the expected shape, 0 without an object",
    "radius_change": "pixels, radius minus that in the first clip",
    "residual": "pixels from the best straight, bouncing motion, root mean square over frames",
    "speed": "pixels per frame of the file",
    "turn": "degrees between the heading and that to which the clip before leads, reflected by walls",
    "texture": "amplitude of the expected texture, 1 as rendered",
    "background_error": "levels of 255 from the plane through the background of the first clip",
    "frozen": "share of frames that differ from the one before by less than half a level in the mean",
}
"""What is measured of every clip of 16 frames."""


class Expected(NamedTuple):
    """The shape and the color that a video should show, as names of classes; empty for none."""

    shape: str
    color: str


class Track(NamedTuple):
    """The measurements of one video."""

    expected: Expected
    curves: dict[str, np.ndarray]
    """For each key of :data:`MEANING` a value per clip, float64 ``[N // 16]``; NaN where there is none."""
    at_borders: list[WindowMotion]
    inside: list[WindowMotion]
    seam: float
    """Energy of the change across borders over that elsewhere; NaN without borders."""


class VideoOverTime:
    """Measures one video.

    Args:
        name: the class that it should show; ``None``: shape and color are those found in its own first clip.
        steps: the frames' numbers in the rendered file, ``[N]`` from 0; further frames are not measured.
        borders: the frames with which a window begins to be new, but for the first.
    """

    def __init__(self, name: str | None, steps: np.ndarray, borders: Sequence[int]) -> None:
        self.expected = None if name is None else Expected(name, name)
        self.steps, self.borders = steps, borders
        self.changes = FrameChanges()
        self.done = 0
        """Frames so far."""
        self._rest: list[np.ndarray] = []  # frames since the last whole clip
        self._clips: list[dict[str, float]] = []
        self._position: list[np.ndarray] = []  # [16, 2] of every clip
        self._radius: list[float] = []
        self._size = (0, 0)
        self._plane: np.ndarray | None = None  # of the first background, [H, W, 3]
        self._before: tuple[int, Motion, float] | None = None  # first frame with an object, motion, radius: clip before

    def add(self, frames: Tensor) -> None:
        """Appends frames, uint8 ``[3, n, H, W]``."""
        array = as_frames("frames", frames)[: len(self.steps) - self.done]
        self._size = (array.shape[1], array.shape[2])
        self.changes.add(array)
        self.done += len(array)
        self._rest += list(array)
        while len(self._rest) >= CLIP:
            self._measure(np.stack(self._rest[:CLIP]), CLIP * len(self._clips))
            del self._rest[:CLIP]

    def result(self) -> Track:
        """All measurements, after all frames."""
        curves = {name: np.array([clip[name] for clip in self._clips]) for name in MEANING}
        position, radius = np.concatenate(self._position), np.repeat(self._radius, CLIP)
        windows = BorderWindows.of([b for b in self.borders if b < len(position)], len(position))
        at_borders, inside = (
            motion_in(ranges, position, radius, self.steps, self._size)
            for ranges in (windows.at_borders, windows.inside)
        )
        expected = self.expected or Expected("", "")
        return Track(expected, curves, at_borders, inside, self.changes.seam(self.borders))

    def _measure(self, frames: np.ndarray, start: int) -> None:
        """Measures the clip uint8 ``[16, H, W, 3]`` that starts with frame ``start``."""
        covered, times = coverage(frames), self.steps[start : start + CLIP]
        times = times - times[0]
        if self.expected is None:
            found = score_covered(frames, covered, next(iter(CLASSES)), times)
            self.expected = Expected(found.shape, found.color)
        score = score_covered(frames, covered, self.expected.shape or next(iter(CLASSES)), times)
        background = mean_background(frames, covered)
        if start == 0:
            self._plane = fit_plane(background)
        clip = _of_object(score, covered, self.expected, min(self._size) >= SHOWS_TEXTURE)
        self._position.append(score.position)
        self._radius.append(score.radius if score.found else np.nan)
        clip["radius_change"] = self._radius[-1] - self._radius[0]
        clip["turn"] = self._turn(score, start)
        clip["background_error"] = background_error(background, self._plane)
        clip["frozen"] = self.changes.frozen(range(start, start + CLIP), self.steps)
        self._clips.append(clip)

    def _turn(self, score: ClipScore, start: int) -> float:
        """The turn since the clip before, which this one then is for the next."""
        seen, before = np.isfinite(score.position).all(axis=1).nonzero()[0], self._before
        if len(seen) < 3:
            self._before = None
            return np.nan
        frame = int(self.steps[start + seen[0]])
        times = (self.steps[start + seen] - frame).astype(np.float64)
        motion = fit_motion(score.position[seen], times, score.radius, self._size)
        self._before = (frame, motion, score.radius)
        if before is None:
            return np.nan
        return unexplained_turn(before[1], motion, frame - before[0], before[2], self._size)


def _of_object(score: ClipScore, covered: Coverage, expected: Expected, shows_texture: bool) -> dict[str, float]:
    """What a clip's score says of its object, compared with what is expected."""
    enough = score.found * CLIP >= 3
    color = covered.color[covered.seen].mean(axis=0) if score.found else np.full(3, np.nan)
    return {
        "found": score.found,
        "shape_right": float(bool(expected.shape) and score.shape == expected.shape),
        "color_right": float(bool(expected.color) and score.color == expected.color),
        "color_error": levels_apart(color, CLASSES[expected.color][2]) if expected.color else np.nan,
        "overlap": score.overlap if expected.shape else 0.0,
        "residual": score.residual if enough else np.nan,
        "speed": score.speed if enough else np.nan,
        "texture": score.texture if score.found and shows_texture and expected.shape else np.nan,
    }
