"""Clips of one object on a plain background along any path, for tests of what is measured over time."""

from __future__ import annotations

import numpy as np

from hpdm.data.synthetic import CLASSES, bounce

BACKGROUND = (40.0, 44.0, 60.0)


def paint(
    name: str, path: np.ndarray, radius: float = 18.0, size: int = 64, color: np.ndarray | None = None
) -> np.ndarray:
    """uint8 ``[F, size, size, 3]`` with an object of class ``name`` at ``path [F, 2]``.

    ``color [F, 3]`` takes the place of the class's color.
    """
    shape, texture, rgb = CLASSES[name]
    y, x = (grid + 0.5 for grid in np.mgrid[0:size, 0:size])
    dx, dy = x - path[:, 0, None, None], y - path[:, 1, None, None]
    cover = np.clip(0.5 - shape(dx / radius, dy / radius) * radius, 0, 1)[..., None]
    wave = 2 * np.pi / (size / 16)
    painted = np.array(rgb)[None] if color is None else color
    paint = painted[:, None, None] * (0.8 + 0.2 * np.tanh(2 * texture(dx * wave, dy * wave)))[..., None]
    return np.clip(np.round(BACKGROUND + cover * (paint - BACKGROUND)), 0, 255).astype(np.uint8)


def straight(
    frames: int,
    velocity: tuple[float, float],
    start: tuple[float, float] = (28.0, 34.0),
    radius: float = 18.0,
    size: int = 64,
) -> np.ndarray:
    """A straight path that bounces off the walls, ``[frames, 2]``."""  # fmt: skip
    steps = np.arange(frames)
    return np.stack([bounce(s, v, radius, size - radius, steps)[0] for s, v in zip(start, velocity)], axis=1)
