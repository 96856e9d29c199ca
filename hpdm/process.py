"""The noise process: the noise schedule, v-prediction, and the scale of the network's input (paper sections 4.5, 4.6).

With the cosine schedule ``g(t) = cos^2(pi t / 2)`` the noised video is ``x~ = sqrt(g) b x + sqrt(1-g) e``, where ``b``
scales the clean signal ``x`` (per pyramid level in the paper). Everything below works on the scaled signal ``y = b x``:
it is an ordinary variance-preserving diffusion of ``y``, with ``v = sqrt(g) e - sqrt(1-g) y``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DATA_STD = 0.5
"""Standard deviation of pixels in [-1, 1] that :func:`network_input` assumes."""
T_MAX = 0.995
"""Sampling starts at this time, where sqrt(g) = 0.008: at t = 1 the network's input would hold no signal at all."""
SIGMA_MAX = math.tan(math.pi / 2 * T_MAX)
"""The noise level of :data:`T_MAX`, noise over signal."""


def gamma(t: Tensor) -> Tensor:
    """The cosine schedule, ``g = cos^2(pi t / 2)``: share of signal, 1 at t = 0, 0 at t = 1."""
    return torch.cos(t * (math.pi / 2)).square()


def time_of_sigma(sigma: Tensor) -> Tensor:
    """The time at which noise over signal is ``sigma = sqrt((1-g) / g)``; the inverse of ``tan(pi t / 2)``."""
    return torch.atan(sigma) * (2 / math.pi)


def add_noise(x: Tensor, noise: Tensor, t: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """The noised patches and their v targets.

    Args:
        x: clean patches ``[B, L, ...]`` in [-1, 1].
        noise: standard normal, same shape.
        t: times ``[B, L]`` in [0, 1].
        signal: signal scale of each level, ``b [L]``.

    Returns:
        ``x~`` and ``v``, both ``[B, L, ...]``.
    """
    g = _expand_to(gamma(t), x)  # [B, L, 1...]
    y = x * _expand_to(signal.expand_as(t), x)
    return g.sqrt() * y + (1 - g).sqrt() * noise, g.sqrt() * noise - (1 - g).sqrt() * y


def denoise(noised: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The scaled clean patch ``y^`` that ``v`` predicts: ``sqrt(g) x~ - sqrt(1-g) v``; ``t [B]`` for ``[B, ...]``."""
    g = _expand_to(gamma(t), noised)  # [B, 1...]
    return g.sqrt() * noised - (1 - g).sqrt() * v


def network_input(noised: Tensor, t: Tensor, signal: Tensor) -> Tensor:
    """``x~`` scaled to unit variance, ``x~ / sqrt(g (b std)^2 + 1 - g)``, whatever the signal scale.

    Args:
        noised: ``x~``, ``[..., C, f, h, w]``.
        t: times, one per patch, ``[...]``.
        signal: signal scale ``b``, broadcastable to ``t``.
    """
    return noised / _expand_to(noised_std(t, signal), noised)


def noised_std(t: Tensor, signal: Tensor | float) -> Tensor:
    """Standard deviation of ``x~`` at times ``t [...]``; ``signal`` is the scale ``b``, broadcastable to ``t``."""
    g = gamma(t)
    return (g * (signal * DATA_STD) ** 2 + 1 - g).sqrt()


def sampling_times(steps: int) -> list[float]:
    """``steps + 1`` times from :data:`T_MAX` down to 0, evenly spaced, as suits the cosine schedule.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    return [T_MAX * (1 - i / steps) for i in range(steps)] + [0.0]


def edm_sigmas(steps: int, sigma_min: float, rho: float) -> list[float]:
    """``steps + 1`` noise levels from :data:`SIGMA_MAX` to ``sigma_min``, evenly spaced in ``sigma^(1 / rho)``, then 0.

    Karras et al. 2022, eq. 5, where ``rho`` is 7. The larger ``|rho|``, the more even the spacing is in ``log sigma``.
    Steps in ``log sigma`` are smallest at the clean end with a negative ``rho``, at the noisy end with a positive one.

    Args:
        steps: with one step there is no room for ``sigma_min``; it goes from :data:`SIGMA_MAX` to 0.
        sigma_min: the last noise level before 0.
        rho: exponent.

    Raises:
        ValueError: fewer than one step, ``sigma_min`` not between 0 and :data:`SIGMA_MAX`, or ``rho`` 0 or not finite.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if not 0 < sigma_min < SIGMA_MAX:
        raise ValueError(f"sigma_min: got {sigma_min}, expected a noise level between 0 and {SIGMA_MAX:.1f}")
    if rho == 0 or not math.isfinite(rho):
        raise ValueError(f"rho: got {rho}, expected a finite number other than 0")
    first, last = SIGMA_MAX ** (1 / rho), sigma_min ** (1 / rho)
    between = [(first + i / (steps - 1) * (last - first)) ** rho for i in range(1, steps)]
    return [SIGMA_MAX, *between, 0.0]


def _expand_to(values: Tensor, x: Tensor) -> Tensor:
    """``values`` with axes of size 1 appended, so that it broadcasts against ``x``."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
