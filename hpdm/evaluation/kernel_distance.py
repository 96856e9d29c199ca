"""The kernel distance of two sets of features, in fp64: KVD, where the features are those of FVD."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np


def polynomial_mmd(a: np.ndarray, b: np.ndarray, *, paired: bool = False, block: int = 1024) -> float:
    """Squared maximum mean discrepancy with the kernel ``k(x, y) = (x . y / W + 1)^3``, without bias.

    The mean of ``k`` over all pairs of different rows of ``a``, plus that of ``b``, minus twice the mean over all pairs
    of a row of ``a`` and one of ``b`` (Gretton et al. 2012, lemma 6; kernel of Binkowski et al. 2018, and of LVDM's
    public code). Its expectation is zero for sets of one distribution, whatever their numbers; a value may be negative.

    Memory is that of the sets in fp64 and of one matrix ``[block, block]``.

    Args:
        a: ``[N, W]``, N >= 2.
        b: ``[M, W]``, M >= 2.
        paired: rows of the same number belong together, such as two clips of one video. Such pairs are left out of
            the mean over ``a`` and ``b``, which stays without bias then; the distance of a set from itself is zero.
        block: rows at a time; the value depends on it by rounding alone.

    Raises:
        ValueError: not two-dimensional, fewer than two rows, different widths, values that are not finite, or sets of
            different numbers that are ``paired``.
    """
    if block < 1:
        raise ValueError(f"block: got {block}, expected at least 1")
    a, b = _rows("a", a), _rows("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"b: got shape {list(b.shape)}, expected [M, {a.shape[1]}] as of a")
    if paired and len(a) != len(b):
        raise ValueError(f"b: got {len(b)} rows, expected {len(a)} as of a, since they are paired")
    within = _mean_over_different(a, a, block) + _mean_over_different(b, b, block)
    if paired:
        return within - 2 * _mean_over_different(a, b, block)
    return within - 2 * math.fsum(k.sum() for _, _, k in _blocks(a, b, block)) / (len(a) * len(b))


def _rows(name: str, array: np.ndarray) -> np.ndarray:
    rows = np.asarray(array, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not rows.shape[1]:
        raise ValueError(f"{name}: got shape {list(rows.shape)}, expected [N, W] with at least 2 rows")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite values")
    return rows


def _mean_over_different(a: np.ndarray, b: np.ndarray, block: int) -> float:
    """Mean of ``k(a_i, b_j)`` over i != j, for sets of one number."""
    sums = []
    for i, j, k in _blocks(a, b, block, half=a is b):
        if i == j:
            np.fill_diagonal(k, 0.0)
        sums.append(k.sum() * (2 if a is b and i != j else 1))
    return math.fsum(sums) / (len(a) * (len(a) - 1))


def _blocks(a: np.ndarray, b: np.ndarray, block: int, *, half: bool = False) -> Iterator[tuple[int, int, np.ndarray]]:
    """The kernel's matrix, a block at a time, with the first row and column; with ``half`` those with i <= j."""
    for i in range(0, len(a), block):
        for j in range(i if half else 0, len(b), block):
            k = a[i : i + block] @ b[j : j + block].T
            k /= a.shape[1]
            k += 1.0
            k *= k * k
            yield i, j, k
