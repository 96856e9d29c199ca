"""The solver of all samplers: EDM's Algorithm 2 (Karras et al. 2022), of which DDIM and Heun are special cases.

It works in EDM's variable ``x = y + sigma e``, where ``y`` is the scaled clean video: ``x`` is the noised video ``x~``
of :mod:`hpdm.process` divided by ``sqrt(g)``, and ``sigma = sqrt((1 - g) / g) = tan(pi t / 2)``. In this variable every
step is a linear combination ``alpha * base + beta * y^`` of a video and the denoised prediction ``y^``, so a sampler
can compute both in one pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from hpdm.process import T_MAX, sampling_times

SIGMA_MAX = math.tan(math.pi / 2 * T_MAX)
"""The highest noise level; churn does not go above it."""


class Update(Protocol):
    """The part of a step that calls the network."""

    def __call__(self, x: Tensor, sigma: float, base: Tensor, alpha: float, beta: float) -> Tensor:
        """``alpha * base + beta * y^``, where ``y^`` is the clean video that is predicted from ``x`` at ``sigma``."""
        ...


@dataclass(frozen=True)
class Solver:
    """The number of steps, their order, and the stochasticity (churn)."""

    steps: int
    second_order: bool
    """Heun's correction: two predictions per step, except for the last step."""
    churn: float = 0.0
    """EDM's S_churn; 0 is deterministic."""
    churn_range: tuple[float, float] = (0.05, 50.0)
    """Noise levels sigma between which churn acts, EDM's S_tmin and S_tmax."""

    @property
    def predictions(self) -> int:
        """Number of denoised predictions."""
        return 2 * self.steps - 1 if self.second_order else self.steps

    def sigmas(self) -> list[float]:
        """``steps + 1`` noise levels down to 0."""
        return [math.tan(math.pi / 2 * t) for t in sampling_times(self.steps)]

    def start(self, noise: Tensor) -> Tensor:
        """The initial ``x``, whose ``x~`` is standard normal ``noise``, since it holds almost no signal."""
        return noise * math.hypot(1.0, self.sigmas()[0])

    def solve(self, x: Tensor, update: Update, noise: Callable[[], Tensor]) -> Tensor:
        """Integrates from pure noise to the scaled clean video ``y``.

        Args:
            x: from :meth:`start`.
            update: predicts ``y^`` and combines it.
            noise: draws standard normal noise of the shape of ``x``, for churn.
        """
        for sigma, next_sigma in pairwise(self.sigmas()):
            raised = self._raised(sigma)
            if raised > sigma:  # churn: add noise up to a higher noise level
                x = x + math.sqrt(raised**2 - sigma**2) * noise()
            # Euler: x' = x + (s' - s) * (x - y) / s = (s' / s) x + (1 - s' / s) y
            x_next = update(x, raised, x, next_sigma / raised, 1 - next_sigma / raised)
            if self.second_order and next_sigma > 0:
                # Heun: x + (s' - s) / 2 * ((x - y) / s + (x' - y') / s'), where (x - y) / s = (x' - x) / (s' - s), so
                # it is (x + x') / 2 + h (x' - y') with h = (s' - s) / (2 s').
                half = (next_sigma - raised) / (2 * next_sigma)
                x_next = update(x_next, next_sigma, x.lerp(x_next, 0.5).add_(x_next, alpha=half), 1.0, -half)
            x = x_next
        return x

    def _raised(self, sigma: float) -> float:
        """The noise level after churn: ``sigma (1 + gamma)`` of Algorithm 2, at most :data:`SIGMA_MAX`."""
        if self.churn == 0 or not self.churn_range[0] <= sigma <= self.churn_range[1]:
            return sigma
        return min(sigma * (1 + min(self.churn / self.steps, math.sqrt(2) - 1)), SIGMA_MAX)
