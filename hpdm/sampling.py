"""What all samplers share: their options, their interface, and how they report progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from hpdm.checks import at_least, check_choice
from hpdm.solvers import Solver

AXES = "fhw"
"""The axes of a video by letter: frames, height, width."""

Progress = Callable[[int, int, int], None]
"""Called as (part, network calls done, network calls in all) after every network call on that part."""

SolverName = Literal["edm", "heun", "ddim"]
"""``"edm"``: second order with churn. ``"heun"``: the same without churn. ``"ddim"``: first order, without churn."""

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
    """Factor on the number of steps from each level to the next (appendix C: halved)."""
    solver: SolverName = "edm"
    """Solver on level 0."""
    later_solver: SolverName = "ddim"
    """Solver on later levels, where a second-order correction made grain (appendix D.3)."""
    overlap: str = "fhw"
    """Axes on which tiles overlap: "none" or some of the letters f, h, w (Table 4)."""
    tiles_per_patch: int = 2
    """Tiles that start within one patch on an overlapping axis: 2 is 50 % overlap, 4 is 75 %."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none, 0 is unconditional."""
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
        at_least(self, 0, "churn")
        if not 0 < self.steps_decay <= 1:
            raise ValueError(f"steps_decay: got {self.steps_decay}, expected a factor in (0, 1]")

    def level_steps(self, level: int) -> int:
        """Steps on a level, at least one."""
        return max(1, round(self.steps * self.steps_decay**level))

    def level_solver(self, level: int) -> Solver:
        """The solver of a level."""
        name = self.later_solver if level else self.solver
        churn = self.churn if name == "edm" else 0.0
        return Solver(self.level_steps(level), name != "ddim", churn, self.churn_range)


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
