"""What all samplers share: their options, their interface, and how they report progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from hpdm.checks import at_least, check_choice
from hpdm.process import COSINE, Schedule
from hpdm.solvers import FEWEST_STEPS, Method, Solver, Spacing, noise_levels

AXES = "fhw"
"""The axes of a video by letter: frames, height, width."""

Progress = Callable[[int, int, int], None]
"""Called as (part, network calls done, network calls in all) after every network call on that part."""

SolverName = Literal["edm", "heun", "ddim", "ddpm", "2m"]
"""``"edm"``: second order with churn, two predictions per step. ``"heun"``: the same without churn. ``"ddim"``: first
order, without churn. ``"ddpm"``: the same with all of the noise of the reverse chain (eta = 1). ``"2m"``:
DPM-Solver++(2M), second order with one prediction per step, without churn."""

METHODS: dict[SolverName, Method] = {"edm": "heun", "heun": "heun", "ddim": "euler", "ddpm": "euler", "2m": "2m"}

CacheMode = Literal["gpu", "cpu", "off"]
"""Where features of finished levels are cached: on the model's device, in host memory, or not at all."""


@dataclass(frozen=True)
class SamplerOptions:
    """How to sample.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    steps: int = 128
    """Steps on level 0."""
    steps_decay: float = 0.5
    """Factor on the number of steps from each level to the next (appendix C: halved). A level takes at least as many
    steps as its solver needs: two for "2m", else one."""
    solver: SolverName = "edm"
    """Solver on level 0."""
    later_solver: SolverName = "2m"
    """Solver on later levels."""
    spacing: Spacing = "edm"
    """Noise levels of the steps. "edm": evenly spaced in sigma^(1/rho) down to --sigma-min. "time": evenly spaced in
    the diffusion time."""
    rho: float = -10.0
    """Exponent of the spacing "edm": EDM has 7; a large one means evenly spaced in log sigma, a negative one smaller
    steps towards the clean end."""
    sigma_min: float = 0.005
    """Last noise level of the spacing "edm", in pixels of [-1, 1]: on each level it is multiplied by the scale of the
    signal."""
    overlap: str = "fhw"
    """Axes on which tiles overlap: "none" or some of the letters f, h, w (Table 4)."""
    tiles_per_patch: int = 2
    """Tiles that start within one patch on an overlapping axis: 2 is 50 % overlap, 4 is 75 %."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none, 0 is unconditional."""
    later_guidance: float | None = None
    """Guidance weight on later levels; --guidance if not given. At 1 they take half the work of guided ones."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest noise level at which guidance acts, in pixels of [-1, 1] as --sigma-min; at the others the
    weight is 1. Everywhere if not given."""
    context_noise: float = 0.0
    """Time, from clean 0 to noise 1, to which finished levels are noised before they become the context of the levels
    above. It suits a model that has seen such contexts in training."""
    consistency: float = 0.0
    """Share of the difference between a later level, averaged down to the size of the level below, and that finished
    level which is taken away from every prediction; 1 makes them agree exactly. Not in the paper."""
    known_noise: float = 0.27
    """Time to which known frames are noised on level 0, in videos of several windows and those that go on from frames
    of the user: such frames may have errors, which noise hides. The network is told."""
    later_known_noise: float = 0.0
    """Time to which known frames are noised on later levels."""
    frame_guidance: float = 0.0
    """Guidance by known frames on level 0: (1 + w) v - w v', where v' is predicted without knowing them."""
    churn: float = 10.0
    """Stochasticity of the solver "edm", EDM's S_churn."""
    churn_range: tuple[float, float] = (0.05, 50.0)
    """Noise levels sigma between which churn acts, EDM's S_tmin and S_tmax."""
    clip: bool = True
    """Clamp predictions to the range of pixels."""
    tile_batch: int = 64
    """Patches per network call, guidance counted twice."""
    cache: CacheMode = "gpu"
    """Where features of finished levels are cached: on the device ("gpu") or in host memory ("cpu"). "off" computes
    them again for each batch of tiles."""

    def __post_init__(self) -> None:
        parse_overlap(self.overlap)
        check_choice("solver", self.solver, SolverName)
        check_choice("later_solver", self.later_solver, SolverName)
        check_choice("cache", self.cache, CacheMode)
        at_least(self, 1, "steps", "tile_batch")
        at_least(self, 2, "tiles_per_patch")
        at_least(self, 0, "churn", "frame_guidance")
        if not 0 < self.steps_decay <= 1:
            raise ValueError(f"steps_decay: got {self.steps_decay}, expected a factor in (0, 1]")
        for name in ("context_noise", "known_noise", "later_known_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a time in [0, 1)")
        if not 0 <= self.consistency <= 1:
            raise ValueError(f"consistency: got {self.consistency}, expected a share in [0, 1]")
        low, high = self.guidance_interval or (0.0, math.inf)
        if not 0 <= low < high:
            raise ValueError(f"guidance_interval: got {self.guidance_interval}, expected 0 <= lowest < highest")
        noise_levels(self.spacing, self.steps, self.sigma_min, self.rho)
        fewest = FEWEST_STEPS[METHODS[self.solver]]
        if self.steps < fewest:
            raise ValueError(f"steps: got {self.steps}, expected at least {fewest} for solver {self.solver!r}")

    def level_steps(self, level: int) -> int:
        """Steps on a level, at least as many as its solver needs."""
        return max(FEWEST_STEPS[METHODS[self._solver_name(level)]], round(self.steps * self.steps_decay**level))

    def level_solver(self, level: int, signal: float = 1.0, schedule: Schedule = COSINE) -> Solver:
        """The solver of a level whose clean signal is scaled by ``signal``, b_l of :mod:`hpdm.process`.

        ``schedule`` is that of the model.
        """
        name = self._solver_name(level)
        sigmas = noise_levels(self.spacing, self.level_steps(level), self.sigma_min * signal, self.rho, schedule)
        churn, eta = (self.churn if name == "edm" else 0.0), (1.0 if name == "ddpm" else 0.0)
        return Solver(sigmas, METHODS[name], churn, self.churn_range, eta)

    def level_guidance(self, level: int) -> float:
        """The guidance weight of a level, where guidance acts."""
        return self.guidance if level == 0 or self.later_guidance is None else self.later_guidance

    def level_known_noise(self, level: int) -> float:
        """The time to which known frames of a level are noised."""
        return self.later_known_noise if level else self.known_noise

    def guidance_at(self, level: int, sigma: float, signal: float = 1.0) -> float:
        """The guidance weight of a level at the noise level ``sigma``, if the clean signal is scaled by ``signal``."""
        low, high = self.guidance_interval or (0.0, math.inf)
        return self.level_guidance(level) if low <= sigma / signal <= high else 1.0

    def _solver_name(self, level: int) -> SolverName:
        return self.later_solver if level else self.solver


class Sampler(Protocol):
    """Samples whole videos from a model, part by part (the levels of a pyramid); the last part is the result.

    A collective: under ``torch.distributed`` every rank makes the same call and gets the same videos.
    """

    options: SamplerOptions

    def __init__(self, model: Any, options: SamplerOptions | None = None) -> None:
        """``model`` is in eval mode, on the device to sample on."""

    def __call__(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        progress: Progress | None = None,
        finished: Sequence[Tensor] = (),
        on_level: Callable[[int, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """The videos of every part, ``[B, C, F, H, W]`` each; arguments as of :meth:`parts`.

        ``on_level`` is called as (part, videos) after every part that this call samples.
        """
        ...

    def parts(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        progress: Progress | None = None,
        finished: Sequence[Tensor] = (),
    ) -> Iterator[Tensor]:
        """Yields the videos of each part as it is finished, ``[B, C, F, H, W]`` float32 in [-1, 1].

        Args:
            seeds: B seeds, one per video.
            labels: ``[B]`` int64 classes, or ``None``.
            text: embeddings ``[B, S, text_width]``, or ``None``.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
            progress: called after every network call.
            finished: videos of the first parts, from an interrupted call with the same arguments. They are not yielded
                again.
        """
        ...

    def seams(self, video: Tensor) -> dict[str, float]:
        """How visible tile borders are in one sampled video ``[C, F, H, W]``, by axis; empty without tiles."""
        ...


def parse_overlap(overlap: str) -> tuple[bool, bool, bool]:
    """``"none"`` or some of the letters f, h, w (paper Table 4) as three flags (frames, height, width).

    Raises:
        ValueError: anything else.
    """
    letters = "" if overlap == "none" else overlap
    if (not letters and overlap != "none") or set(letters) - set(AXES) or len(set(letters)) != len(letters):
        raise ValueError(f"overlap: got {overlap!r}, expected 'none' or some of the letters f, h, w, e.g. 'hw'")
    f, h, w = (axis in letters for axis in AXES)
    return (f, h, w)
