"""Scores for clips of the synthetic set, measured without a learned detector: motion, shape, color, texture.

The set is rendered by a formula (:mod:`hpdm.data.synthetic`), which is fitted to each clip here. Per frame:

1. *Background*, linear in x and y in every channel: least squares on the darkest two fifths of the pixels (an object
   covers at most about half of a picture and is brighter than any background), then on all pixels that agree with it.
2. *Coverage*: the difference from the background, projected on its mean over the pixels that differ most; 1 inside
   the object, 0 outside.
3. *Template*: a class's signed distance painted at (x, y, radius), fitted to the coverage by Gauss-Newton steps from
   the coverage's area and centroid. All six are fitted; their overlap with the coverage says which shape it is.

Per clip: the best straight line bouncing off the walls (:func:`hpdm.data.synthetic.bounce`) through the positions.

``docs/evaluation.md`` gives the accuracy on rendered clips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from hpdm.data.synthetic import CLASSES, bounce
from hpdm.video import as_frames

CONTRAST = 20.0
"""Least contrast of an object with its background, in levels of 255; below it a frame has no object."""

_STEPS = 4  # Gauss-Newton steps; more do not improve the positions of rendered clips
_AGREES = 24.0  # largest distance of a background pixel from the fitted background, in levels of 255
TEXTURE_PERIODS = 16  # over the shorter side
SHOWS_TEXTURE = 2 * TEXTURE_PERIODS
"""Least pixels of a clip's shorter side that show texture: two per period."""
_FASTEST = 0.05  # share of the shorter side per frame: over twice the speed of rendered clips


class Coverage(NamedTuple):
    """The object of every frame, apart from the background. All float64."""

    share: np.ndarray
    """``[F, H, W]`` in [0, 1]: 1 inside the object, 0 outside."""
    color: np.ndarray
    """``[F, 3]``, the object's mean color, 0..255."""
    contrast: np.ndarray
    """``[F]``, the distance of that color from the background's in levels of 255, root mean square over channels."""

    @property
    def seen(self) -> np.ndarray:
        """Frames that have an object, bool ``[F]``."""
        return self.contrast >= CONTRAST


class Object(NamedTuple):
    """A class's template fitted to every frame of a clip. Pixels: x right, y down, the picture's corner at (0, 0)."""

    position: np.ndarray  # float64 [F, 2]: (x, y) of the center
    radius: np.ndarray  # float64 [F]: half of the extent
    overlap: np.ndarray  # float64 [F]: intersection over union of template and coverage, 0..1


class Motion(NamedTuple):
    """The best-fitting straight, bouncing motion."""

    residual: float  # pixels, root mean square distance of the positions from it
    velocity: np.ndarray  # float64 [2], (x, y) in pixels per step at the first frame; signs flip at walls
    position: np.ndarray  # float64 [2], (x, y) in pixels at the first frame

    @property
    def speed(self) -> float:
        """Pixels per step."""
        return float(np.hypot(*self.velocity))


def coverage(frames: np.ndarray) -> Coverage:
    """Separates the object of every frame from the background.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
    """
    pixels = frames.astype(np.float64)
    count, height, width = frames.shape[:3]
    y, x = np.mgrid[0:height, 0:width]
    plane = np.stack([np.ones(height * width), (x.ravel() + 0.5) / width - 0.5, (y.ravel() + 0.5) / height - 0.5], 1)
    cover, color, contrast = np.zeros((count, height, width)), np.zeros((count, 3)), np.zeros(count)
    for n, image in enumerate(pixels.reshape(count, -1, 3)):
        brightness = image.max(axis=1)
        is_background = brightness <= np.quantile(brightness, 0.4)
        for _ in range(3):
            background = plane @ np.linalg.lstsq(plane[is_background], image[is_background], rcond=None)[0]
            difference = image - background
            distance = np.sqrt((difference**2).mean(axis=1))
            agrees = distance < _AGREES
            is_background = agrees if agrees.mean() > 0.2 else is_background
        inside = distance >= 0.4 * np.quantile(distance, 0.95)
        amplitude = difference[inside].mean(axis=0)
        contrast[n] = np.sqrt((amplitude**2).mean())
        color[n] = image[inside].mean(axis=0)
        share = difference @ amplitude / max(float(amplitude @ amplitude), 1e-9)
        # Texture varies the brightness inside an object, where the coverage is 1 nevertheless. So the share is mapped
        # by a steep, clipped line: the share itself would overlap less with the right template, and more in blurred
        # clips.
        cover[n] = np.clip(4 * share - 1.3, 0, 1).reshape(height, width)
    return Coverage(cover, color, contrast)


def fit_template(cover: np.ndarray, name: str) -> Object:
    """Fits a class's shape to the coverage of every frame.

    Args:
        cover: float64 ``[F, H, W]`` in [0, 1], not all zero in any frame.
        name: a key of :data:`hpdm.data.synthetic.CLASSES`.
    """
    shape = CLASSES[name][0]
    height, width = cover.shape[1:]
    unit = min(height, width)
    # float32 is faster and gives about the same positions.
    y, x = (grid + np.float32(0.5) for grid in np.mgrid[0:height, 0:width].astype(np.float32))
    low, high = np.array([0, 0, 0.1 * unit]), np.array([width, height, 0.6 * unit])

    def painted(at: np.ndarray) -> np.ndarray:
        center_x, center_y, radius = (column[:, None, None].astype(np.float32) for column in at.T)
        return np.clip(0.5 - shape((x - center_x) / radius, (y - center_y) / radius) * radius, 0, 1)

    cover = cover.astype(np.float32)
    area, centroid = _moments(name)
    mass = cover.sum(axis=(1, 2))
    radius = np.sqrt(mass / area)
    middle = np.stack([(cover * grid).sum(axis=(1, 2)) / mass for grid in (x, y)], axis=1)
    at = np.clip(np.column_stack([middle - centroid * radius[:, None], radius]), low, high)
    for _ in range(_STEPS):
        now = painted(at)
        # Central differences over a pixel, the width of a painted edge.
        slopes = np.stack([(painted(at + h) - painted(at - h)).reshape(len(at), -1) for h in np.eye(3) / 2], axis=2)
        normal_matrix = slopes.transpose(0, 2, 1) @ slopes + 1e-3 * np.eye(3)
        gradient = slopes.transpose(0, 2, 1) @ (cover - now).reshape(len(at), -1, 1)
        at = np.clip(at + np.clip(np.linalg.solve(normal_matrix, gradient)[..., 0], -2, 2), low, high)
    now = painted(at)
    overlap = np.minimum(now, cover).sum(axis=(1, 2)) / np.maximum(now, cover).sum(axis=(1, 2))
    return Object(at[:, :2], at[:, 2], overlap)


@cache
def _moments(name: str) -> tuple[float, np.ndarray]:
    """Area and centroid of a shape of half extent 1."""
    grid = (np.arange(512) + 0.5) / 256 - 1
    inside = CLASSES[name][0](grid[None, :], grid[:, None]) < 0
    return inside.mean() * 4, np.array([(inside * grid[None, :]).sum(), (inside * grid[:, None]).sum()]) / inside.sum()


def _bounced(
    start: np.ndarray, speed: np.ndarray, low: float, high: float, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions, and +1 or -1 where the motion goes with or against ``speed``; :func:`bounce` with broadcasting."""
    return bounce(low, 1.0, low, high, start - low + speed * steps)


def walls(radius: float, extent: float) -> tuple[float, float]:
    """The positions along one axis at which an object turns.

    Args:
        radius: half of its extent in pixels.
        extent: of the picture along the axis.
    """
    return min(radius, extent / 2 - 0.5), max(extent - radius, extent / 2 + 0.5)


def fit_motion(position: np.ndarray, steps: np.ndarray, radius: float, size: tuple[int, int]) -> Motion:
    """Fits a straight, bouncing motion to the positions, by grid search and Gauss-Newton steps per axis.

    Args:
        position: float64 ``[F, 2]``, (x, y) in pixels.
        steps: float64 ``[F]``, the frames' times.
        radius: half of the object's extent in pixels: it turns at this distance from the walls.
        size: (height, width) of the picture.
    """
    fastest = _FASTEST * min(size)
    squared, velocity, start = np.zeros(len(steps)), np.zeros(2), np.zeros(2)
    for axis, extent in enumerate((size[1], size[0])):
        measured = position[:, axis]
        low, high = walls(radius, extent)
        starts = np.arange(low, high, 0.5)[:, None, None]
        speeds = np.linspace(-fastest, fastest, 81)[:, None]
        error = ((_bounced(starts, speeds, low, high, steps)[0] - measured) ** 2).sum(axis=-1)
        first, second = np.unravel_index(error.argmin(), error.shape)
        best = error.min()
        at = np.array([starts[first, 0, 0], speeds[second, 0]])
        for _ in range(5):
            moved, sign = _bounced(at[0], at[1], low, high, steps)
            slopes = np.stack([sign, sign * steps], axis=1)
            trial = at + np.linalg.lstsq(slopes, measured - moved, rcond=None)[0]
            after = ((_bounced(trial[0], trial[1], low, high, steps)[0] - measured) ** 2).sum()
            if after >= best:
                break
            at, best = trial, after
        moved, sign = _bounced(at[0], at[1], low, high, steps)
        squared += (moved - measured) ** 2
        velocity[axis] = at[1] * sign[0]  # a fitted start beyond a wall is a mirror image, which moves the other way
        start[axis] = moved[0]
    return Motion(float(np.sqrt(squared.mean())), velocity, start)


def texture_contrast(frames: np.ndarray, fit: Object, name: str) -> float:
    """How much of a class's texture an object has: 1 as rendered, 0 for a plain or a wrongly textured surface.

    In each frame the brightness inside the template is regressed on the class's pattern at any phase. The result is
    the pattern's root mean square amplitude over that of a rendered clip, averaged over frames.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        fit: the class's template in every frame.
        name: the class.
    """
    shape, texture, rgb = CLASSES[name]
    height, width = frames.shape[1:3]
    wave = 2 * np.pi / (min(height, width) / TEXTURE_PERIODS)
    y, x = (grid + 0.5 for grid in np.mgrid[0:height, 0:width])
    brightness = frames @ np.array(rgb, dtype=np.float64) / np.dot(rgb, rgb)
    amplitudes = []
    for image, (center_x, center_y), radius in zip(brightness, fit.position, fit.radius):
        dx, dy = x - center_x, y - center_y
        inside = shape(dx / radius, dy / radius) * radius < -1.5  # pixels from the edge
        pattern = _patterns(texture, dx[inside] * wave, dy[inside] * wave)
        if len(pattern) <= pattern.shape[1] + 1:
            amplitudes.append(0.0)
            continue
        pattern -= pattern.mean(axis=0)
        part = pattern @ np.linalg.lstsq(pattern, image[inside] - image[inside].mean(), rcond=None)[0]
        amplitudes.append(float(np.sqrt((part**2).mean())))
    return float(np.mean(amplitudes)) / _rendered_rms(name)


def _patterns(texture: Callable[[np.ndarray, np.ndarray], np.ndarray], u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Four columns ``[pixels, 4]`` whose linear combinations are the texture at any phase of either axis."""
    quarter = np.pi / 2
    return np.stack([texture(u + a, v + b) for a in (0, quarter) for b in (0, quarter)], axis=1)


@cache
def _rendered_rms(name: str) -> float:
    """Amplitude of the pattern that the regression of :func:`texture_contrast` finds in a rendered clip."""
    v, u = np.meshgrid(*[np.arange(64) * 2 * np.pi / 64] * 2, indexing="ij")
    texture = CLASSES[name][1]
    pattern = _patterns(texture, u.ravel(), v.ravel())
    painted = 0.2 * np.tanh(2 * texture(u, v)).ravel()
    return float(np.sqrt(((pattern @ np.linalg.lstsq(pattern, painted, rcond=None)[0]) ** 2).mean()))


@dataclass(frozen=True)
class ClipScore:
    """The measurements of one clip, compared with the class that it should show. Pixels are those of the clip."""

    found: float
    """Share of frames with an object; the fields below are measured on these frames, unless stated otherwise."""
    residual: float
    """Pixels, root mean square distance from the best straight, bouncing motion. With an object in fewer than three
    frames it is the picture's shorter side, the worst value."""
    speed: float
    """Pixels per frame of the file."""
    radius: float
    """Pixels, the median."""
    overlap: float
    """Intersection over union with the class's own template, the mean over all frames (0 without an object)."""
    shape: str
    """The class whose template overlaps most; empty without objects."""
    color: str
    """The class whose color is nearest; empty without objects."""
    color_error: float
    """Levels of 255 between the object's mean color and its class's, root mean square over channels."""
    texture: float
    """See :func:`texture_contrast`; 0 for a clip too small to show it (:data:`SHOWS_TEXTURE`)."""
    position: np.ndarray = field(repr=False)
    """float64 ``[F, 2]``, NaN without an object."""


def score_clip(frames: np.ndarray, name: str, steps: np.ndarray | None = None) -> ClipScore:
    """Measures one clip.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        name: the class that it should show, a key of :data:`hpdm.data.synthetic.CLASSES`.
        steps: the frames' numbers in the rendered file, ``[F]`` from 0; ``None`` for consecutive frames.

    Raises:
        TypeError, ValueError: frames of another kind (:func:`hpdm.video.as_frames`), an unknown class.
    """
    frames = as_frames("frames", frames)
    if name not in CLASSES:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(CLASSES)}")
    return score_covered(frames, coverage(frames), name, steps)


def score_covered(frames: np.ndarray, covered: Coverage, name: str, steps: np.ndarray | None = None) -> ClipScore:
    """:func:`score_clip` of a clip whose coverage is known; arguments are not checked."""
    cover, colors, seen = covered.share, covered.color, covered.seen
    position, worst_residual = np.full((len(frames), 2), np.nan), float(min(frames.shape[1:3]))
    if not seen.any():
        worst_color = float(np.sqrt((np.array(CLASSES[name][2]) ** 2).mean()))
        return ClipScore(0.0, worst_residual, 0.0, 0.0, 0.0, "", "", worst_color, 0.0, position)
    fits = {other: fit_template(cover[seen], other) for other in CLASSES}
    own = fits[name]
    position[seen] = own.position
    radius = float(np.median(own.radius))
    times = (np.arange(len(frames)) if steps is None else steps)[seen].astype(np.float64)
    motion = fit_motion(own.position, times, radius, frames.shape[1:3])
    color = colors[seen].mean(axis=0)
    distance = {other: levels_apart(color, rgb) for other, (_, _, rgb) in CLASSES.items()}
    return ClipScore(
        found=float(seen.mean()),
        residual=motion.residual if seen.sum() >= 3 else worst_residual,
        speed=motion.speed,
        radius=radius,
        overlap=float(own.overlap.sum() / len(frames)),
        shape=max(fits, key=lambda other: fits[other].overlap.mean()),
        color=min(distance, key=lambda other: distance[other]),
        color_error=distance[name],
        texture=texture_contrast(frames[seen], own, name) if min(frames.shape[1:3]) >= SHOWS_TEXTURE else 0.0,
        position=position,
    )


def levels_apart(color: np.ndarray, rgb: tuple[int, int, int]) -> float:
    """Distance of an object's mean color from its class's, in levels of 255, root mean square over channels."""
    # Texture multiplies the class's color by 0.8 on average.
    return float(np.sqrt(((color - 0.8 * np.array(rgb)) ** 2).mean()))
