"""A second player of training: what the model of a system trains against, with weights and an optimizer of its own.

:mod:`hpdm.training.second_player` trains it beside the model. It is part of a run's checkpoints and of nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Game(NamedTuple):
    """What a micro-batch of B clips gives to the two players. Its tensors are float32."""

    losses: dict[str, Tensor]
    """The model's losses without its opponent by name, ``[B]`` each, as of :meth:`hpdm.system.System.losses`."""
    against: Tensor
    """One number that the model minimizes besides. No gradient of it reaches the opponent."""
    own: Tensor
    """One number that the opponent minimizes. No gradient of it reaches the model."""
    reported: dict[str, Tensor]
    """Numbers for the log by the names of their columns, without gradients."""


class Opponent(ABC):
    """A kind of opponent; it holds no weights.

    Args:
        start: the first step in which it takes part, counted from 1 as in the log.
        betas: decays of the moments of Adam, by which it learns; its learning rate is the model's.
    """

    def __init__(self, start: int, betas: tuple[float, float]) -> None:
        self.start, self.betas = start, betas

    @abstractmethod
    def build(self) -> nn.Module:
        """The opponent's network with random weights and no buffers; it is called in train mode alone."""

    @abstractmethod
    def play(
        self,
        opponent: nn.Module,
        model: Any,
        batch: Mapping[str, Tensor],
        draws: Any,
        network: Callable[..., Any] | None = None,
    ) -> Game:
        """The losses of both players for a batch, from one forward pass of the model.

        Args:
            opponent: what :meth:`build` returned, on the model's device.
            model, batch, draws, network: as of :meth:`hpdm.system.System.losses`.
        """
