"""The solvers of all samplers: DDIM and DDPM, Heun's method with and without churn, and DPM-Solver++(2M).

They work in EDM's variable ``x = y + sigma e`` (Karras et al. 2022), where ``y`` is the scaled clean video: ``x`` is
the noised video ``x~`` of :mod:`hpdm.process` divided by ``sqrt(g)``, and ``sigma = sqrt((1-g) / g)``.
In this variable every step is a linear combination of videos and denoised predictions ``y^``, and its part with a new
prediction is ``alpha * base + beta * y^``, which a sampler can compute in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor

from hpdm.checks import check_choice
from hpdm.process import COSINE, Schedule, edm_sigmas, sampling_times

Method = Literal["euler", "heun", "2m"]
"""``"euler"``: first order; without churn this is DDIM, with eta = 1 DDPM. ``"heun"``: second order with two
predictions per step. ``"2m"``: second order with one prediction per step, which uses that of the step before."""

Spacing = Literal["edm", "time"]
"""``"edm"``: evenly spaced in a power of sigma, :func:`hpdm.process.edm_sigmas`. ``"time"``: evenly spaced in t."""

FEWEST_STEPS: dict[Method, int] = {"euler": 1, "heun": 1, "2m": 2}
"""A method with memory needs a step before. With one step, Heun's method is Euler's."""

HELD: dict[Method, int] = {"euler": 3, "2m": 4, "heun": 5}
"""Tensors of a video's size while it is solved: sample, scaled sample, prediction, and what the method keeps."""


def noise_levels(
    spacing: Spacing, steps: int, sigma_min: float, rho: float, schedule: Schedule = COSINE
) -> tuple[float, ...]:
    """``steps + 1`` noise levels down to 0.

    Args:
        spacing: see :data:`Spacing`.
        steps: number of steps.
        sigma_min: the last noise level before 0, for ``"edm"``.
        rho: exponent, for ``"edm"``.
        schedule: noise of the first step, and the time of ``"time"``. As many steps as a chain of betas has are its
            own.

    Raises:
        ValueError: unknown spacing, or numbers out of range as in :func:`hpdm.process.edm_sigmas`.
    """
    if check_choice("spacing", spacing, Spacing) == "time":
        return tuple(schedule.sigma(t) for t in sampling_times(steps, schedule.t_max))
    return tuple(edm_sigmas(steps, sigma_min, rho, schedule.sigma_max))


class Update(Protocol):
    """The part of a step that calls the network."""

    def __call__(self, x: Tensor, sigma: float, base: Tensor, alpha: float, beta: float) -> Tensor:
        """``alpha * base + beta * y^``, where ``y^`` is the clean video that is predicted from ``x`` at ``sigma``."""
        ...


@dataclass(frozen=True)
class Solver:
    """Noise levels, the method that steps from each to the next, and the stochasticity (churn).

    Raises:
        ValueError: an unknown method, too few steps for it, noise levels that do not fall to 0, churn with a method
            that has none, or ``eta`` out of range or with another method than Euler's without churn.
    """

    sigmas: tuple[float, ...]
    """Noise levels, falling, the last one 0."""
    method: Method
    churn: float = 0.0
    """EDM's S_churn; 0 is deterministic."""
    churn_range: tuple[float, float] = (0.05, 50.0)
    """Noise levels sigma between which churn acts, EDM's S_tmin and S_tmax."""
    eta: float = 0.0
    """Share of the noise of a step of the reverse chain that Euler's method takes out more and adds anew (Song et al.
    2021, eq. 16): 0 is DDIM; 1 is DDPM, with the posterior variance of Ho et al. 2020."""

    def __post_init__(self) -> None:
        fewest = FEWEST_STEPS[check_choice("method", self.method, Method)]
        if self.steps < fewest:
            raise ValueError(f"steps: got {self.steps}, expected at least {fewest} for solver {self.method!r}")
        if self.sigmas[-1] != 0 or any(a <= b for a, b in pairwise(self.sigmas)):
            raise ValueError(f"sigmas: got {self.sigmas}, expected falling noise levels that end with 0")
        if self.churn and self.method == "2m":
            raise ValueError(f"churn: got {self.churn}, expected 0 for solver '2m', which is deterministic")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: got {self.eta}, expected a share in [0, 1]")
        if self.eta and (self.method != "euler" or self.churn):
            raise ValueError(f"eta: got {self.eta}, expected 0 for solver {self.method!r} with churn {self.churn}")

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.sigmas) - 1

    @property
    def predictions(self) -> int:
        """Number of denoised predictions."""
        return len(self.prediction_sigmas())

    def prediction_sigmas(self) -> list[float]:
        """The noise levels of the denoised predictions, in order."""
        levels = []
        for sigma, next_sigma in pairwise(self.sigmas):
            levels.append(self._raised(sigma))
            if self.method == "heun" and next_sigma > 0:
                levels.append(next_sigma)
        return levels

    def solve(self, update: Update, noise: Callable[[], Tensor]) -> Tensor:
        """Integrates from pure noise to the scaled clean video ``y``.

        Args:
            update: predicts ``y^`` and combines it; it returns a new tensor.
            noise: draws standard normal noise of the shape of the video, for the start, for churn and for ``eta``.
        """
        return self._solve_multistep(update, noise) if self.method == "2m" else self._solve_single_step(update, noise)

    def _start(self, noise: Callable[[], Tensor]) -> Tensor:
        """The initial ``x``, whose ``x~`` is standard normal noise, since it holds almost no signal."""
        return noise() * math.hypot(1.0, self.sigmas[0])

    def _solve_multistep(self, update: Update, noise: Callable[[], Tensor]) -> Tensor:
        """DPM-Solver++(2M): Lu et al. 2022b, Algorithm 2, in EDM's variable, where ``lambda = -log sigma``.

        A step of size ``h = log(s / s')`` after one of size ``h_old`` is ``x' = (s' / s) x + (1 - s' / s) D`` with
        ``D = (1 + c) y^ - c y^_old`` and ``c = h / (2 h_old)``. The first step has no ``y^_old``, and in the last one,
        to ``s' = 0``, h is infinite: both take ``D = y^``.
        """
        x = self._start(noise)
        old: Tensor | None = None
        h_old = math.inf
        for sigma, next_sigma in pairwise(self.sigmas):
            h = math.log(sigma / next_sigma) if next_sigma else math.inf
            c = 0.0 if old is None or not next_sigma else h / (2 * h_old)
            d = update(x, sigma, x if old is None else old, -c, 1 + c)
            x.lerp_(d, 1 - next_sigma / sigma)
            # The prediction itself, for the next step: y^ = (D + c y^_old) / (1 + c).
            old = d if old is None else old.mul_(c).add_(d).div_(1 + c)
            h_old = h
        return x

    def _solve_single_step(self, update: Update, noise: Callable[[], Tensor]) -> Tensor:
        """Karras et al. 2022, Algorithm 2, of which DDIM and Heun's method are special cases."""
        x = self._start(noise)
        for sigma, next_sigma in pairwise(self.sigmas):
            raised = self._raised(sigma)
            if raised > sigma:  # churn: add noise up to a higher noise level
                x = x + math.sqrt(raised**2 - sigma**2) * noise()
            # Euler: x' = x + (s' - s) * (x - y) / s = (s' / s) x + (1 - s' / s) y, to a lower noise level if noise is
            # added then.
            lowered, added = self._ancestral(raised, next_sigma)
            x_next = update(x, raised, x, lowered / raised, 1 - lowered / raised)
            if added:
                x_next.add_(noise(), alpha=added)
            if self.method == "heun" and next_sigma > 0:
                # Heun: x + (s' - s) / 2 * ((x - y) / s + (x' - y') / s'), where (x - y) / s = (x' - x) / (s' - s), so
                # it is (x + x') / 2 + h (x' - y') with h = (s' - s) / (2 s').
                half = (next_sigma - raised) / (2 * next_sigma)
                x_next = update(x_next, next_sigma, x.lerp(x_next, 0.5).add_(x_next, alpha=half), 1.0, -half)
            x = x_next
        return x

    def _ancestral(self, sigma: float, next_sigma: float) -> tuple[float, float]:
        """Where a step from ``sigma`` to ``next_sigma`` goes, and how much noise it adds then.

        With eta = 1 the added variance is that of ``q(x' | x, y)``, which is ``s'^2 (s^2 - s'^2) / s^2`` in EDM's
        variable (Ho et al. 2020, eq. 7); its mean is on the line from ``x`` to ``y``.
        """
        added = self.eta * next_sigma * math.sqrt(1 - (next_sigma / sigma) ** 2) if self.eta else 0.0
        return (math.sqrt(next_sigma**2 - added**2) if added else next_sigma), added

    def _raised(self, sigma: float) -> float:
        """The noise level after churn: ``sigma (1 + gamma)`` of Algorithm 2, at most that of the start."""
        if self.churn == 0 or not self.churn_range[0] <= sigma <= self.churn_range[1]:
            return sigma
        return min(sigma * (1 + min(self.churn / self.steps, math.sqrt(2) - 1)), self.sigmas[0])
