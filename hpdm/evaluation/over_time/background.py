"""How far the background of a clip is from that of the first one, which is linear in x and y in every channel."""

from __future__ import annotations

import numpy as np

from hpdm.evaluation.synthetic_score import Coverage

_MARGIN = 2  # pixels around an object that do not count as background
_LEAST = 0.01  # share of the picture that must be background, if only for a frame


def mean_background(frames: np.ndarray, covered: Coverage) -> np.ndarray:
    """The mean over a clip of every pixel, of the frames in which no object is there or near.

    Args:
        frames: uint8 ``[F, H, W, 3]``.
        covered: by objects.

    Returns:
        float64 ``[H, W, 3]`` in 0..255; NaN for a pixel that an object covers in every frame.
    """
    near = _widened((covered.share > 0) & covered.seen[:, None, None])  # [F, H, W]
    free = ~near[..., None]
    count = free.sum(axis=0)
    total = np.where(free, frames, 0).sum(axis=0, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def fit_plane(background: np.ndarray) -> np.ndarray | None:
    """The plane ``a + bx + cy`` of every channel through a background, by least squares.

    Args:
        background: float64 ``[H, W, 3]``, NaN where it is not known.

    Returns:
        The plane at every pixel, float64 ``[H, W, 3]``; ``None`` where too little of the background is known.
    """
    height, width, _ = background.shape
    known = np.isfinite(background).all(axis=2)
    if known.mean() < _LEAST:
        return None
    y, x = np.mgrid[0:height, 0:width]
    terms = np.stack([np.ones((height, width)), (x + 0.5) / width - 0.5, (y + 0.5) / height - 0.5], axis=2)
    return terms @ np.linalg.lstsq(terms[known], background[known], rcond=None)[0]


def background_error(background: np.ndarray, plane: np.ndarray | None) -> float:
    """Levels of 255 between a background and a plane, root mean square over pixels and channels that are known.

    NaN without a plane, and where too little of the background is known.
    """
    known = np.isfinite(background).all(axis=2)
    if plane is None or known.mean() < _LEAST:
        return float("nan")
    return float(np.sqrt(((background - plane)[known] ** 2).mean()))


def _widened(near: np.ndarray) -> np.ndarray:
    """``[F, H, W]`` bool, true also within :data:`_MARGIN` pixels, in each direction, of what is true."""
    for axis in (1, 2):
        padding = [(_MARGIN, _MARGIN) if n == axis else (0, 0) for n in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(near, padding), 2 * _MARGIN + 1, axis)
        near = np.any(windows, axis=(-1,))
    return near
