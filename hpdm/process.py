"""The diffusion of a patch: v-prediction with a per-level input scale (paper sections 4.5 and 4.6).

With ``g = cos^2(pi t / 2)`` the noised patch is ``x~ = sqrt(g) b_l x + sqrt(1-g) e``. Everything below works on the
scaled clean patch ``y = b_l x``: it is an ordinary variance-preserving diffusion of ``y``, with
``v = sqrt(g) e - sqrt(1-g) y``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpdm.patch.config import HPDMConfig

DATA_STD = 0.5
"""Standard deviation of pixels in [-1, 1] that the input normalisation assumes."""
T_MAX = 0.995
"""Sampling starts here, where sqrt(g) = 0.008: the network's last noise level with any signal."""


def gamma(t: Tensor) -> Tensor:
    """The cosine schedule, ``g = cos^2(pi t / 2)``: share of signal, 1 at t = 0, 0 at t = 1."""
    return torch.cos(t * (math.pi / 2)).square()


def time_of_sigma(sigma: Tensor) -> Tensor:
    """The time at which noise over signal is ``sigma = sqrt((1-g) / g)``; the inverse of ``tan(pi t / 2)``."""
    return torch.atan(sigma) * (2 / math.pi)


def _like(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def add_noise(x: Tensor, noise: Tensor, t: Tensor, signal: Tensor) -> tuple[Tensor, Tensor]:
    """The noised patch and its v target.

    Args:
        x: clean patches ``[B, L, ...]`` in [-1, 1].
        noise: standard normal, same shape.
        t: times ``[B, L]`` in [0, 1].
        signal: ``b_l``, ``[L]``.

    Returns:
        ``x~`` and ``v``, both ``[B, L, ...]``.
    """
    g = _like(gamma(t), x)
    y = x * _like(signal.expand_as(t), x)
    return g.sqrt() * y + (1 - g).sqrt() * noise, g.sqrt() * noise - (1 - g).sqrt() * y


def denoise(noised: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The scaled clean patch ``y^`` that ``v`` predicts: ``sqrt(g) x~ - sqrt(1-g) v``; ``t [B]`` for ``[B, ...]``."""
    g = _like(gamma(t), noised)
    return g.sqrt() * noised - (1 - g).sqrt() * v


def network_input(noised: Tensor, t: Tensor, signal: Tensor) -> Tensor:
    """``x~`` at unit variance, which a smaller input scale would break: ``x~ / sqrt(g (b_l std)^2 + 1 - g)``.

    Args:
        noised: ``[..., C, f, h, w]``.
        t: times, one per patch.
        signal: ``b_l``, broadcastable to ``t``.
    """
    g = gamma(t)
    std = (g * (signal * DATA_STD) ** 2 + 1 - g).sqrt()
    return noised / _like(std, noised)


def signal_scales(config: HPDMConfig, device: torch.device | str | None = None) -> Tensor:
    """``b_l`` of every level, ``[L]`` float32."""
    return torch.tensor([config.signal_scale(n) for n in range(config.levels)], device=device)


def sampling_times(steps: int) -> list[float]:
    """``steps + 1`` times from :data:`T_MAX` down to 0, even in t, which the cosine schedule is made for.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    return [T_MAX * (1 - i / steps) for i in range(steps)] + [0.0]
