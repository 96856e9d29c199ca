"""Validation of the arguments that the average of tiles and :class:`hpdm_kernels.TileAccumulator` share."""

from __future__ import annotations

from torch import Tensor

from hpdm_kernels._checks import check_number


def check_factors(alpha: object, beta: object, x: Tensor | None) -> tuple[float, float]:
    """Checks the factors of ``x`` and of the mean: finite numbers, ``alpha`` 0 without ``x``; returns them as floats.

    Raises:
        TypeError: not a number.
        ValueError: not finite, a tensor with a gradient, or ``alpha`` without ``x``.
    """
    alpha, beta = check_number("alpha", alpha), check_number("beta", beta)
    if x is None and alpha != 0.0:
        raise ValueError(f"alpha: got {alpha} without x, expected 0.0 or a tensor x to multiply")
    return alpha, beta
