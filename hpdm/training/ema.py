"""Moving averages of the weights: several lengths at once, sharded like the weights.

The power function of Karras et al. 2024 ("Analyzing and improving the training dynamics of diffusion models", section
3.1) weights the state after update ``i`` by ``i^gamma``. Its length grows with the run: it is told as the relative
width ``sigma_rel``, the standard deviation of the weighting as a share of all updates. So a width means the same for a
run of 2,000 steps and one of 40,000, and the random start is forgotten by itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hpdm.training.sharded import shards
from hpdm.training.stored import buffers_of

N = TypeVar("N", float, Tensor)
WIDEST = 1 / math.sqrt(12)
"""Relative width of the plain mean of all updates (``gamma = 0``); a wider average would favor the start."""


def gamma_of_width(width: float) -> float:
    """The exponent ``gamma`` whose average has the relative width ``width`` (Karras et al. 2024, Algorithm 2).

    The width is ``sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))`` (their appendix C).

    Raises:
        ValueError: a width outside of (0, 0.288], where 0.288 is the plain mean of all updates.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(
            f"ema: got {width}, expected a relative width above 0 and at most 0.288; a decay is --ema-decay"
        )
    square = width**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    return max(0.0, float(roots.real.max()))


class Law(Protocol):
    """How much of an average stays in an update."""

    def decay(self, updates: N) -> N:
        """The share that stays in the update after ``updates`` earlier ones, a number or a tensor of one."""


@dataclass(frozen=True)
class PowerLaw:
    """Karras et al. 2024, eq. 1 and 2: at update t = 1, 2, ... the share ``(1 - 1/t)^(gamma + 1)`` stays.

    The first update replaces the average by the weights.

    Raises:
        ValueError: as :func:`gamma_of_width`.
    """

    width: float
    """Relative width ``sigma_rel``."""

    def __post_init__(self) -> None:
        gamma_of_width(self.width)

    @cached_property
    def gamma(self) -> float:
        """The exponent of the weighting."""
        return gamma_of_width(self.width)

    def decay(self, updates: N) -> N:
        """The share that stays in the update after ``updates`` earlier ones, a number or a tensor of one."""
        return (1 - 1 / (updates + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class ConstantDecay:
    """A constant share stays, after a start in which less does: ``min(limit, (1 + n) / (10 + n))`` at update n.

    A limit of 0.9999 is first reached at update 89,990. Before it this is nearly the power function of width 0.09.

    Raises:
        ValueError: a limit outside of [0, 1).
    """

    limit: float

    def __post_init__(self) -> None:
        if not 0 <= self.limit < 1:
            raise ValueError(f"ema_decay: got {self.limit}, expected a number in [0, 1)")

    def decay(self, updates: N) -> N:
        """The share that stays in the update after ``updates`` earlier ones, a number or a tensor of one."""
        share = (1 + updates) / (10 + updates)
        return share.clamp(max=self.limit) if isinstance(share, Tensor) else min(self.limit, share)


def laws(widths: Sequence[float], decay: float | None) -> list[Law]:
    """The averages of a recipe: one with a constant ``decay`` if there is one, else one of each width.

    Raises:
        ValueError: neither or both, a number out of range, or two widths that have one name.
    """
    if (decay is None) == (not widths):
        raise ValueError(f"ema: got widths {list(widths)} and ema_decay {decay}, expected one of the two")
    if decay is not None:
        return [ConstantDecay(decay)]
    averages = [PowerLaw(width) for width in widths]
    names = [_name(width) for width in widths]
    if len(set(names)) < len(names):
        raise ValueError(f"ema: got {list(widths)}, expected widths that differ by 0.001 or more")
    return list(averages)


def folder_names(widths: Sequence[float]) -> list[str]:
    """The folders of a checkpoint that hold the averages: ``ema`` for the first, ``ema-0.100`` for others."""
    return ["ema", *(_name(width) for width in widths[1:])]


def folder_of_weights(weights: str, widths: Sequence[float]) -> str:
    """The folder of a checkpoint that ``--weights`` means.

    Args:
        weights: ``"model"``, ``"ema"`` for the first average, or ``"ema-WIDTH"`` for any of them.
        widths: relative widths of the run's averages; none for an average with a constant decay.

    Raises:
        ValueError: the run has no such weights; the message names those that it has.
    """
    named = dict(zip(map(_name, widths), folder_names(widths)))
    known = {"model": "model", "ema": "ema", **named}
    try:
        asked = _name(float(weights.removeprefix("ema-"))) if weights.startswith("ema-") else weights
    except ValueError:
        asked = weights
    if asked not in known:
        raise ValueError(f"weights: got {weights!r}, expected one of {', '.join(map(repr, known))}")
    return known[asked]


def _name(width: float) -> str:
    return f"ema-{width:.3f}"


class EMA:
    """Moving averages of a model's parameters, sharded like them.

    Shard the model, and load the weights that it starts from, before making its averages: they start as its weights.

    Args:
        model: whose parameters are averaged. Its persistent buffers are not: each average has its own, ``buffers``.
        *averages: the law of each: one :class:`ConstantDecay`, or one or more :class:`PowerLaw`. A run is sampled from
            the first unless told otherwise.

    Raises:
        TypeError: no law, or others than these.
    """

    def __init__(self, model: nn.Module, *averages: Law) -> None:
        kinds = {type(law) for law in averages}
        if kinds != {PowerLaw} and not (kinds == {ConstantDecay} and len(averages) == 1):
            raise TypeError(f"averages: got {averages}, expected one ConstantDecay, or one or more PowerLaw")
        self.averages = averages
        self.shadows = [{name: p.detach().clone() for name, p in model.named_parameters()} for _ in averages]
        self.buffers = [{name: b.clone() for name, b in buffers_of(model).items()} for _ in averages]
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        # On the device, where it is decided whether an update counts; fp64, for the laws.
        self._updates = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)

    @property
    def updates(self) -> int:
        """The number of updates so far; reading it waits for the device."""
        return int(self._updates)

    @updates.setter
    def updates(self, number: int) -> None:
        self._updates.fill_(number)

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The first average: its tensors by the names of the parameters."""
        return self.shadows[0]

    @property
    def folders(self) -> dict[str, dict[str, Tensor]]:
        """All averages and what was measured of them, by the folder of a checkpoint that holds them."""
        widths = [law.width for law in self.averages if isinstance(law, PowerLaw)]
        return dict(zip(folder_names(widths), map(self.stored, range(len(self.shadows)))))

    def stored(self, average: int) -> dict[str, Tensor]:
        """An average and what was measured of it, by name; sharded like the weights."""
        return self.shadows[average] | self.buffers[average]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the averages towards the model's current parameters."""
        weights = shards(model.parameters())
        for rate, shadow in zip(self.rates(), self.shadows):
            for average, weight in zip(shards(shadow.values()), weights):
                average.lerp_(weight, rate.to(average.dtype))
        self._updates += 1

    def rates(self) -> Tensor:
        """How much of the weights each average takes on in the next update, ``[K]`` fp64 on the device."""
        return torch.stack([1 - law.decay(self._updates) for law in self.averages])

    def averages_of(self, params: Sequence[Tensor]) -> list[list[Tensor]]:
        """For each average its tensors of some of the model's parameters, for an optimizer that moves them itself."""
        return [[shadow[self._names[p]] for p in params] for shadow in self.shadows]

    @torch.no_grad()
    def finish(self, moved: Collection[Tensor], apply: Tensor | None) -> None:
        """Counts an update in which an optimizer has moved the averages of some parameters, and moves the others.

        Args:
            moved: the parameters whose averages are moved already.
            apply: one truth value on the device; where it is false, this update does not count. ``None`` for true.
        """
        applied = torch.ones_like(self._updates, dtype=torch.bool) if apply is None else apply
        others = [p for p in self._names if p not in moved]
        for rate, average in zip(self.rates(), self.averages_of(others)):
            for t, p in zip(shards(average), shards(others)):
                t.copy_(torch.where(applied, torch.lerp(t, p, rate.to(p.dtype)), t))
        self._updates += applied
