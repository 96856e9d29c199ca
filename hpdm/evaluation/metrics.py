"""Distances and scores between sets of features: Frechet distance and Inception score, in fp64.

:mod:`hpdm.evaluation.detector` computes the features, :mod:`hpdm.evaluation.distribution` says of which clips.
"""

from __future__ import annotations

import numpy as np


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches, in the memory of one matrix ``[W, W]``.

    Batches are merged by their own mean and scatter (Chan, Golub, LeVeque 1983), so that features far from zero lose no
    digits, as they do in ``mean(x x^T) - mean(x) mean(x)^T``.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    @classmethod
    def of(cls, count: int, mean: np.ndarray, covariance: np.ndarray) -> FeatureStatistics:
        """Statistics from their stored values :attr:`count`, :attr:`mean` and ``covariance(unbiased=False)``."""
        self = cls()
        self.count, self.mean, self._scatter = count, mean, covariance * count
        return self

    @property
    def width(self) -> int:
        """Features of a vector; 0 before the first batch."""
        return len(self.mean)

    def update(self, features: np.ndarray) -> None:
        """Adds a batch ``[B, W]``.

        Raises:
            ValueError: not two-dimensional, empty, of another width than the batches before, or not finite.
        """
        rows = np.asarray(features, dtype=np.float64)
        if rows.ndim != 2 or 0 in rows.shape or (self.count and rows.shape[1] != self.width):
            expected = f"[B, {self.width}]" if self.count else "[B, W]"
            raise ValueError(f"features: got shape {list(rows.shape)}, expected {expected}, not empty")
        if not np.isfinite(rows).all():
            raise ValueError("features: got NaN or infinity, expected finite values")
        if not self.count:
            self.mean, self._scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1], rows.shape[1]))
        mean = rows.mean(axis=0)
        total = self.count + len(rows)
        step = mean - self.mean
        self._scatter += (rows - mean).T @ (rows - mean) + np.outer(step, step) * (self.count * len(rows) / total)
        self.mean = self.mean + step * (len(rows) / total)
        self.count = total

    def covariance(self, unbiased: bool = True) -> np.ndarray:
        """``[W, W]``: the scatter over ``count - 1``, or over ``count``.

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"features: got {self.count} vector(s), expected at least 2 for a covariance")
        return self._scatter / (self.count - unbiased)


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, the squared 2-Wasserstein distance of two Gaussians.

    The trace of the root is computed as the sum of the singular values of ``C_a^(1/2) C_b^(1/2)``. These are the roots
    of the eigenvalues of ``C_a^(1/2) C_b C_a^(1/2)``, but taking roots of small eigenvalues would lose half of their
    digits. Singular covariances, of fewer vectors than features, need no special treatment.

    Args:
        mean_a, mean_b: ``[W]``.
        covariance_a, covariance_b: ``[W, W]``, symmetric and positive semi-definite.

    Raises:
        ValueError: shapes that do not match, values that are not finite, or an indefinite covariance.
    """
    width = len(mean_a)
    for name, array, shape in (
        ("mean_a", mean_a, (width,)), ("mean_b", mean_b, (width,)),
        ("covariance_a", covariance_a, (width, width)), ("covariance_b", covariance_b, (width, width)),
    ):  # fmt: skip
        if np.shape(array) != shape:
            raise ValueError(f"{name}: got shape {list(np.shape(array))}, expected {list(shape)}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: got NaN or infinity, expected finite values")
    root_a, root_b = _root("covariance_a", covariance_a), _root("covariance_b", covariance_b)
    overlap = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    distance = np.square(np.subtract(mean_a, mean_b)).sum() + np.trace(covariance_a) + np.trace(covariance_b)
    return max(0.0, float(distance - 2 * overlap))


def _root(name: str, covariance: np.ndarray) -> np.ndarray:
    """Symmetric root of ``[W, W]``; eigenvalues within rounding of zero count as zero."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, dtype=np.float64))
    noise = len(values) * np.finfo(np.float64).eps * np.abs(values).max(initial=0.0)
    # The rounding errors of a sum of many outer products are larger than those of its eigenvalues.
    if values.min(initial=0.0) < -1e4 * noise or not np.allclose(covariance, np.transpose(covariance), rtol=1e-6):
        raise ValueError(
            f"{name}: smallest eigenvalue {values.min():.3g}, expected a symmetric matrix without negative ones"
        )
    return (vectors * np.sqrt(np.where(values > noise, values, 0.0))) @ vectors.T


def inception_score(probabilities: np.ndarray, splits: int = 10, shuffle: int | None = None) -> tuple[float, float]:
    """``exp(mean over x of KL(p(y|x) || p(y)))`` (Salimans et al. 2016), mean and standard deviation over splits.

    Args:
        probabilities: ``[N, K]``, rows that sum to one.
        splits: parts of consecutive rows, each with its own ``p(y)``; at most N.
        shuffle: seed of numpy's ``RandomState`` that shuffles the rows first; ``None`` keeps their order.

    Raises:
        ValueError: not two-dimensional, rows that are not probabilities, or more splits than rows.
    """
    rows = np.array(probabilities, dtype=np.float64)
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(f"probabilities: got shape {list(rows.shape)}, expected [N, K], not empty")
    if not (rows >= 0).all() or not np.allclose(rows.sum(axis=1), 1, atol=1e-3):
        raise ValueError("probabilities: expected rows without negative values that sum to 1")
    if not 1 <= splits <= len(rows):
        raise ValueError(f"splits: got {splits}, expected 1..{len(rows)}, the number of rows")
    if shuffle is not None:
        np.random.RandomState(shuffle).shuffle(rows)
    scores = []
    for n in range(splits):
        part = rows[n * len(rows) // splits : (n + 1) * len(rows) // splits]
        ratio = np.divide(part, part.mean(axis=0), out=np.ones_like(part), where=part > 0)
        scores.append(float(np.exp((part * np.log(ratio)).sum(axis=1).mean())))
    return float(np.mean(scores)), float(np.std(scores))
