"""What a training sample shows and how its error counts: noise levels, boxes, contexts, weights.

A kind of model uses the settings that apply to it; :mod:`hpdm.system` hands them to its losses.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hpdm.checks import check_choice
from hpdm.process import COSINE, Prediction, Schedule

Times = Literal["uniform", "logit-normal"]
""""logit-normal" favors the middle, where shapes are decided (Esser et al. 2024, section 3.1, mean 0, variance 1)."""
Weighting = Literal["none", "min-snr"]
BoxLaw = Literal["uniform", "nested"]
DrawnBy = Literal["step", "micro-batch"]
Context = Literal["clean", "same", "independent"]
"""Noise of the lower levels under which the error of a level is measured: none, as when sampling; in the same range of
noise as the level; or any, as in training."""

SNR_CAP = 5.0
"""Gamma of min-SNR (Hang et al. 2023, section 3.4)."""


@dataclass(frozen=True)
class Objective:
    """How the samples of a training run are drawn and weighted.

    Raises:
        ValueError: an unknown choice, or a share or a time outside of its range; the message names the field.
    """

    times: Times = "uniform"
    """Distribution of diffusion times; "logit-normal" favors the middle."""
    low_discrepancy: bool = False
    """Spread the times of a step evenly over their distribution, on each level, which makes losses and gradients less
    noisy. Each time alone is distributed as before."""
    weighting: Weighting = "none"
    """Weight of an error by its noise level: none, or "min-snr": min(SNR, 5) times the error of the clean video. The
    logged losses are weighted; the errors of `hpdm evaluate` are not."""
    boxes: BoxLaw | None = None
    """Positions of patches: "uniform" over the video on the finest level, or "nested", each level uniform inside the
    level below, which hardly ever shows borders. Default: uniform, or what the run had that is resumed."""
    clean_context: float | None = None
    """Share of the samples that show finished lower levels, as sampling does, below a random level. Default: 0.25 for a
    run of `hpdm train`, or what the run had that is resumed; 0 elsewhere."""
    context_t_max: float = 0.2
    """Largest diffusion time of finished lower levels in training; half of them are exactly clean."""
    flip: bool = False
    """Mirror each clip with probability 1/2. Not for clips whose class or caption tells left from right."""
    known_first: float = 0.4
    """With --known-frames: share of the samples of a level whose first frames are known, any number of them."""
    known_ends: float = 0.2
    """With --known-frames: share whose last frames are known, and any number of the first ones, perhaps none."""
    rolling: float = 0.1
    """With --known-frames: share on level 0 in which the noise rises along the frames that are not known."""
    sparse: float = 0.15
    """With --spacing: share of the samples whose level 0 shows frames that are far apart; it alone is trained then."""
    remembered: float = 0.5
    """With --memory: share of the samples that remember the window before."""
    known_t_max: float = 0.476
    """With --known-frames: largest diffusion time of known frames; a quarter of them are exactly clean."""
    cuts: bool = False
    """Train a random number of levels per step, the lowest two or more (appendix D.6): cheaper steps."""
    draws: DrawnBy | None = None
    """What a sample shows is drawn for its place in the "step", whatever the number of processes and the size of
    micro-batches, or for that in its "micro-batch". Default: step, or what the run had that is resumed."""

    def check_only(self, *names: str) -> None:
        """Checks that no other settings than ``names`` are changed, for systems that do not have all.

        Raises:
            ValueError: a field that is none of ``names`` is not its default.
        """
        for f in dataclasses.fields(self):
            if f.name not in names and getattr(self, f.name) != f.default:
                raise ValueError(
                    f"{f.name}: got {getattr(self, f.name)}, expected {f.default}: this preset's model has no choice"
                )

    def __post_init__(self) -> None:
        check_choice("times", self.times, Times)
        check_choice("weighting", self.weighting, Weighting)
        if self.boxes is not None:
            check_choice("boxes", self.boxes, BoxLaw)
        if self.draws is not None:
            check_choice("draws", self.draws, DrawnBy)
        if self.clean_context is not None and not 0 <= self.clean_context < 1:
            raise ValueError(f"clean_context: got {self.clean_context}, expected a share in [0, 1)")
        for name in ("context_t_max", "known_t_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a time in [0, 1]")
        for name in ("sparse", "remembered"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share in [0, 1)")
        shares = (self.known_first, self.known_ends, self.rolling)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"known_first, known_ends, rolling: got {shares}, expected shares that add up to at most 1"
            )


def draw_times(
    shape: tuple[int, int], span: tuple[float, float], generator: torch.Generator, objective: Objective | None = None
) -> Tensor:
    """Diffusion times of B samples on L levels, ``[B, L]`` float32 on the CPU.

    Args:
        shape: ``(B, L)``.
        span: range of the times.
        generator: CPU generator.
        objective: gives their distribution over the range; ``None`` for the default.
    """
    objective = objective or Objective()
    first, last = span
    if objective.low_discrepancy:
        # Sample i of a level takes the quantile (rank_i + shift) / B with a random rank and one shift for all.
        shift = torch.rand(1, shape[1], generator=generator, dtype=torch.float64)
        rank = torch.rand(shape, generator=generator, dtype=torch.float64).argsort(dim=0)
        share = (rank + shift) / shape[0]
        if objective.times == "logit-normal":
            share = torch.special.ndtri(share).sigmoid()
        share = share.float()
    elif objective.times == "uniform":
        share = torch.rand(shape, generator=generator)
    else:
        share = torch.randn(shape, generator=generator).sigmoid()
    return first + (last - first) * share


def loss_weight(
    weighting: Weighting, t: Tensor, signal: Tensor, schedule: Schedule = COSINE, prediction: Prediction = "v"
) -> Tensor:
    """Weight of the squared error of what the network predicts, of the shape of ``t``.

    min-SNR weights the squared error of the clean video ``x`` by ``min(SNR, 5)``, where ``SNR = b^2 g / (1 - g)``.
    The error of x is that of v times ``(1 - g) / b^2``, so the weight of v is ``min(g, 5 (1 - g) / b^2)``; for b = 1 it
    is ``min(SNR, 5) / (SNR + 1)`` (Hang et al. 2023, section 3.4). The error of v is that of the noise over g.

    Args:
        weighting: which weight.
        t: diffusion times.
        signal: scale b of the clean signal (:mod:`hpdm.process`), broadcastable to ``t``.
        schedule: noise schedule of the times.
        prediction: what the network predicts.
    """
    if weighting == "none":
        return torch.ones_like(t)
    g = schedule.gamma(t)
    weight = torch.minimum(g, SNR_CAP * (1 - g) / signal.square())
    return weight if prediction == "v" else weight / g


def draw_noise(batch: int, shape: tuple[int, ...], generator: torch.Generator, rows: range | None = None) -> Tensor:
    """Standard normal noise of B samples, float32 ``[B, *shape]`` on the CPU, or of some ``rows`` of them.

    Rows have seeds of their own, since noise takes long to draw: other numbers than those of all at once.
    """
    if rows is None:
        return torch.randn(batch, *shape, generator=generator)
    seeds = torch.randint(2**32, (batch,), generator=generator).tolist()
    noise = torch.empty(len(rows), *shape)
    for row, out in zip(rows, noise):
        torch.randn(shape, generator=torch.Generator().manual_seed(seeds[row]), out=out)
    return noise


def draw_mirrored(batch: int, generator: torch.Generator) -> Tensor:
    """Draws which of ``batch`` clips are mirrored, each with probability 1/2: bool ``[B]`` on the CPU."""
    return torch.rand(batch, generator=generator) < 0.5


def mirror(video: Tensor, mirrored: Tensor) -> Tensor:
    """Mirrors those clips of ``[B, C, F, H, W]`` left to right that ``mirrored`` (bool ``[B]``) names."""
    return torch.where(mirrored[:, None, None, None, None], video.flip(-1), video)


def on_device(draws: Any, device: torch.device) -> Any:
    """A ``NamedTuple`` of tensors and ``None`` on ``device``; from pinned memory the copies do not wait."""
    return draws._make(None if value is None else value.to(device, non_blocking=True) for value in draws)


def pinned(draws: Any) -> Any:
    """A ``NamedTuple`` of tensors and ``None`` in pinned memory of the host."""
    return draws._make(None if value is None else value.pin_memory() for value in draws)
