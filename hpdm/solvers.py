"""One solver for all levels: EDM's Algorithm 2 (Karras et al. 2022), of which DDIM and Heun are special cases.

It works in EDM's variable ``x = y + sigma e`` with ``y`` the scaled clean video: ``x`` is the noised video ``x~`` of
:mod:`hpdm.process` over ``sqrt(g)``, and ``sigma = sqrt((1 - g) / g) = tan(pi t / 2)``. In it every update is linear
in the current sample and the denoised prediction, which is what one fused pass over the tiles computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from hpdm.process import T_MAX, sampling_times

SIGMA_MAX = math.tan(math.pi / 2 * T_MAX)

Update = Callable[[Tensor, float, Tensor, float, float], Tensor]
"""``update(x, sigma, base, alpha, beta)`` gives ``alpha * base + beta * y^``, with ``y^`` predicted from x at sigma."""


@dataclass(frozen=True)
class Solver:
    """How one level is sampled: the number of steps, their order, and how much noise is stirred in."""

    steps: int
    second_order: bool
    """Heun's correction: twice the predictions but for the last step."""
    churn: float = 0.0
    """EDM's S_churn; 0 is deterministic."""
    churn_range: tuple[float, float] = (0.05, 50.0)
    """Noise levels sigma between which churn acts, EDM's S_tmin and S_tmax."""

    @property
    def predictions(self) -> int:
        """Denoised predictions that a level takes."""
        return 2 * self.steps - 1 if self.second_order else self.steps

    def sigmas(self) -> list[float]:
        """``steps + 1`` noise levels down to 0."""
        return [math.tan(math.pi / 2 * t) for t in sampling_times(self.steps)]

    def start(self, noise: Tensor) -> Tensor:
        """Where a level starts, from standard normal noise: next to no signal at the first noise level."""
        return noise * math.hypot(1.0, self.sigmas()[0])

    def solve(self, x: Tensor, update: Update, noise: Callable[[], Tensor]) -> Tensor:
        """From :meth:`start` to the scaled clean video ``y``; ``noise`` draws more of the kind that ``x`` began as."""
        for sigma, then in pairwise(self.sigmas()):
            raised = self._raised(sigma)
            if raised > sigma:
                x = x + math.sqrt(raised**2 - sigma**2) * noise()
            ahead = update(x, raised, x, then / raised, 1 - then / raised)
            if self.second_order and then > 0:
                # The mean of the slopes here and there: x + (then - raised) / 2 * ((x - y) / raised + (a - y') / then),
                # of which (x - y) / raised is (a - x) / (then - raised).
                half = (then - raised) / (2 * then)
                ahead = update(ahead, then, x.lerp(ahead, 0.5).add_(ahead, alpha=half), 1.0, -half)
            x = ahead
        return x

    def _raised(self, sigma: float) -> float:
        if self.churn == 0 or not self.churn_range[0] <= sigma <= self.churn_range[1]:
            return sigma
        return min(sigma * (1 + min(self.churn / self.steps, math.sqrt(2) - 1)), SIGMA_MAX)
