"""Validation of the arguments that the average of tiles and :class:`hpdm_kernels.TileAccumulator` share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpdm_kernels._checks import check_number, check_tensor
from hpdm_kernels._transforms import differentiates


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


def check_weights(weights: object, tile: Sequence[int]) -> Tensor | None:
    """Checks weights per axis of a ``tile``; returns them as one tensor ``[f + h + w]`` on the CPU, ``None`` for none.

    Their values are checked where they are read, by :func:`hpdm_kernels.tiles.weights.shares`.

    Raises:
        TypeError: not three fp32 tensors.
        ValueError: a wrong shape, a tensor without values, or one that requires a gradient.
    """
    if weights is None:
        return None
    if not isinstance(weights, (tuple, list)) or len(weights) != 3:
        what = f"{len(weights)} entries" if isinstance(weights, (tuple, list)) else type(weights).__name__
        raise TypeError(f"weights: got {what}, expected three tensors (frames, height, width) or None")
    for n, (weight, length) in enumerate(zip(weights, tile)):
        name = f"weights[{n}]"
        check_tensor(name, weight, (length,), dtypes=(torch.float32,))
        if weight.is_meta:
            raise ValueError(f"{name}: got a tensor on the device meta, expected one with values")
        if weight.requires_grad or differentiates((weight,)):
            raise ValueError(f"{name}: got a tensor that requires a gradient, expected none: weights get no gradient")
    return torch.cat([weight.cpu() for weight in weights])
