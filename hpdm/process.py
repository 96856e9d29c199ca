"""The noise process: noise schedules, what networks predict, and the scale of their input (paper sections 4.5, 4.6).

With a schedule ``g(t)``, the share of signal, the noised video is ``x~ = sqrt(g) b x + sqrt(1-g) e``, where ``b``
scales the clean signal ``x`` (per pyramid level in the paper). Everything below works on the scaled signal ``y = b x``:
it is an ordinary variance-preserving diffusion of ``y``, with ``v = sqrt(g) e - sqrt(1-g) y``.

Patch diffusion has the cosine schedule ``g(t) = cos^2(pi t / 2)``, that of the functions which take a time and no
schedule. The others are in :data:`SCHEDULES`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["v", "eps"]
"""What a network predicts: v, or the noise e."""

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
    return mixture(y, noise, g), prediction_target("v", y, noise, g)


def denoise(noised: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The scaled clean patch ``y^`` that ``v`` predicts: ``sqrt(g) x~ - sqrt(1-g) v``; ``t [B]`` for ``[B, ...]``."""
    return clean_of(v, noised, _expand_to(gamma(t), noised))


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


def mixture(y: Tensor, noise: Tensor, g: Tensor | float) -> Tensor:
    """The noised video ``x~ = sqrt(g) y + sqrt(1-g) e``; ``g``, the share of signal, broadcasts against the others."""
    root_g, root_rest = _roots(g)
    return root_g * y + root_rest * noise


def prediction_target(prediction: Prediction, y: Tensor, noise: Tensor, g: Tensor | float) -> Tensor:
    """What a network that predicts ``prediction`` should say; arguments as of :func:`mixture`."""
    root_g, root_rest = _roots(g)
    return noise if prediction == "eps" else root_g * noise - root_rest * y


def v_of(predicted: Tensor, noised: Tensor, g: Tensor | float, prediction: Prediction = "v") -> Tensor:
    """The v that a prediction means: ``v`` itself, or ``(e - sqrt(1-g) x~) / sqrt(g)``.

    Args:
        predicted: what the network said.
        noised: ``x~``.
        g: share of signal, above 0 for ``"eps"``; it broadcasts against the others.
        prediction: what the network predicts.
    """
    root_g, root_rest = _roots(g)
    return predicted if prediction == "v" else (predicted - root_rest * noised) / root_g


def noise_of(predicted: Tensor, noised: Tensor, g: Tensor | float, prediction: Prediction = "v") -> Tensor:
    """The noise that a prediction means: ``sqrt(1-g) x~ + sqrt(g) v``, or ``e`` itself.

    Arguments as of :func:`v_of`.
    """
    root_g, root_rest = _roots(g)
    return predicted if prediction == "eps" else root_rest * noised + root_g * predicted


def clean_of(predicted: Tensor, noised: Tensor, g: Tensor | float, prediction: Prediction = "v") -> Tensor:
    """The clean video that a prediction means: ``sqrt(g) x~ - sqrt(1-g) v``, or ``(x~ - sqrt(1-g) e) / sqrt(g)``.

    Arguments as of :func:`v_of`.
    """
    root_g, root_rest = _roots(g)
    if prediction == "eps":
        return (noised - root_rest * predicted) / root_g
    return root_g * noised - root_rest * predicted


class Schedule(ABC):
    """A noise schedule: how much signal and noise there is at each diffusion time, from clean 0 to noise 1."""

    t_max: float
    """Sampling starts at this time."""

    @abstractmethod
    def gamma(self, t: Tensor) -> Tensor:
        """The share of signal g, 1 at t = 0 and falling; of the shape, dtype and device of ``t``."""

    @abstractmethod
    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which noise over signal is ``sigma = sqrt((1-g) / g)``."""

    def sigma(self, t: float) -> float:
        """Noise over signal at a time."""
        g = float(self.gamma(torch.tensor(t, dtype=torch.float64)))
        return math.sqrt((1 - g) / g)

    @property
    def sigma_max(self) -> float:
        """The noise level at which sampling starts."""
        return self.sigma(self.t_max)


class Cosine(Schedule):
    """The cosine schedule, ``g = cos^2(pi t / 2)``; all functions of this module without a schedule are its own."""

    t_max = T_MAX

    def gamma(self, t: Tensor) -> Tensor:
        return gamma(t)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return time_of_sigma(sigma)

    def sigma(self, t: float) -> float:
        return math.tan(math.pi / 2 * t)


@dataclass(frozen=True)
class Betas(Schedule):
    """A chain of steps whose roots of beta rise linearly: "linear" in the sense of latent diffusion.

    Step s of ``steps`` multiplies the share of signal by ``1 - beta_s``, where ``beta = linspace(sqrt(first),
    sqrt(last))^2``. In the papers' numbering, from 0, it ends at the time ``(s + 1) / steps``. Between two steps log g
    is linear in the time, so that solvers may stop anywhere. The chain ends with a little signal, and sampling starts
    there.

    Raises:
        ValueError: betas that are not 0 < first <= last < 1, or fewer than two steps; the message names the field.
    """

    first: float = 0.0015
    last: float = 0.0155
    steps: int = 1000

    t_max = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.last < 1:
            raise ValueError(f"first, last: got {self.first}, {self.last}, expected 0 < first <= last < 1")
        if self.steps < 2:
            raise ValueError(f"steps: got {self.steps}, expected at least 2")

    @property
    def betas(self) -> Tensor:
        """``[steps]`` float64."""
        first, last = math.sqrt(self.first), math.sqrt(self.last)
        return torch.linspace(first, last, self.steps, dtype=torch.float64).square()

    def time_of_step(self, step: int) -> float:
        """The time at which step ``step``, from 0, ends.

        Raises:
            ValueError: no step of the chain.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step: got {step}, expected one of 0..{self.steps - 1}")
        return (step + 1) / self.steps

    def gamma(self, t: Tensor) -> Tensor:
        place = (t.to(torch.float64) * self.steps).clamp(0, self.steps)
        step = place.floor().clamp(max=self.steps - 1).long()  # the one under way
        logs = _log_gammas(self).to(t.device)
        return torch.lerp(logs[step], logs[step + 1], place - step).exp().to(t.dtype)

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        log_g = -torch.log1p(sigma.to(torch.float64).square())
        logs = _log_gammas(self).to(sigma.device)
        step = (torch.searchsorted(-logs, -log_g) - 1).clamp(0, self.steps - 1)
        share = (log_g - logs[step]) / (logs[step + 1] - logs[step])
        return ((step + share.clamp(0, 1)) / self.steps).to(sigma.dtype)


@functools.cache
def _log_gammas(betas: Betas) -> Tensor:
    """Logarithms of g before the first step and after every one, float64 ``[steps + 1]`` on the CPU."""
    logs = torch.log1p(-betas.betas).cumsum(0)
    return torch.cat((logs.new_zeros(1), logs))


COSINE = Cosine()
"""The schedule of patch diffusion."""

SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {"cosine": COSINE, "linear": Betas(), "stable-diffusion": Betas(0.00085, 0.012)}
)
"""Schedules by name. "linear": that of latent video diffusion (the released configs; sqrt(g) ends at 0.026).
"stable-diffusion": that of its text-to-video model, whose images came from Stable Diffusion."""


def sampling_times(steps: int, t_max: float = T_MAX) -> list[float]:
    """``steps + 1`` times from ``t_max`` down to 0, evenly spaced, as suits the cosine schedule.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    return [t_max * (1 - i / steps) for i in range(steps)] + [0.0]


def edm_sigmas(steps: int, sigma_min: float, rho: float, sigma_max: float = SIGMA_MAX) -> list[float]:
    """``steps + 1`` noise levels from ``sigma_max`` to ``sigma_min``, evenly spaced in ``sigma^(1 / rho)``, then 0.

    Karras et al. 2022, eq. 5, where ``rho`` is 7. The larger ``|rho|``, the more even the spacing is in ``log sigma``.
    Steps in ``log sigma`` are smallest at the clean end with a negative ``rho``, at the noisy end with a positive one.

    Args:
        steps: with one step there is no room for ``sigma_min``; it goes from ``sigma_max`` to 0.
        sigma_min: the last noise level before 0.
        rho: exponent.
        sigma_max: the first noise level.

    Raises:
        ValueError: fewer than one step, ``sigma_min`` not between 0 and ``sigma_max``, or ``rho`` 0 or not finite.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min: got {sigma_min}, expected a noise level between 0 and {sigma_max:.1f}")
    if rho == 0 or not math.isfinite(rho):
        raise ValueError(f"rho: got {rho}, expected a finite number other than 0")
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    between = [(first + i / (steps - 1) * (last - first)) ** rho for i in range(1, steps)]
    return [sigma_max, *between, 0.0]


def _roots(g: Tensor | float) -> tuple[Tensor | float, Tensor | float]:
    """``sqrt(g)`` and ``sqrt(1 - g)``."""
    return (g.sqrt(), (1 - g).sqrt()) if isinstance(g, Tensor) else (math.sqrt(g), math.sqrt(1 - g))


def _expand_to(values: Tensor, x: Tensor) -> Tensor:
    """``values`` with axes of size 1 appended, so that it broadcasts against ``x``."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
