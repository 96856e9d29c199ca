"""The second player of a run: what the model trains against (:mod:`hpdm.opponent`), in training on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from hpdm import distributed
from hpdm.opponent import Opponent
from hpdm.training.adamw import AdamW


class SecondPlayer:
    """An opponent's network with its optimizer: Adam at the model's learning rate, without decay of the weights.

    Every rank has all of both. In a step, one backward pass per micro-batch gives the gradients of both players, at the
    weights from before the step. The model's random numbers do not depend on whether it has an opponent.

    Args:
        opponent: what kind of.
        device: the model's.
        kernels: backend of the optimizer's step.
    """

    def __init__(self, opponent: Opponent, device: torch.device, kernels: str = "auto") -> None:
        self.opponent = opponent
        with torch.random.fork_rng(devices=[]):
            self.network = opponent.build().to(device)
        self.optimizer = AdamW(self.network.parameters(), betas=opponent.betas, weight_decay=0.0, backend=kernels)
        self.loss_names: list[str] = []
        """Names of the model's losses without its opponent."""
        self.reported: list[str] = []
        """Further columns of the log."""

    def plays(self, step: int) -> bool:
        """Whether it takes part in a step, counted from 1."""
        return step >= self.opponent.start

    def values(
        self, model: Any, batch: Mapping[str, Tensor], draws: Any, network: Callable[..., Any] | None = None
    ) -> Tensor:
        """A micro-batch's L losses, one number that is minimized besides, and the numbers reported: ``[L + 1 + R]``."""
        game = self.opponent.play(self.network, model, batch, draws, network)
        self.loss_names[:], self.reported[:] = game.losses, game.reported
        losses = torch.stack(list(game.losses.values()), dim=1).mean(0)
        return torch.cat((losses, torch.stack((game.against + game.own, *game.reported.values()))))

    def minimized(self, values: Tensor) -> Tensor:
        """What is minimized of :meth:`values`, one number: the mean of the losses, and what is minimized besides."""
        losses = len(self.loss_names)
        return values[:losses].mean() + values[losses]

    def columns(self, values: Tensor) -> dict[str, Tensor]:
        """The numbers for the log of :meth:`values` by name."""
        return dict(zip(self.reported, values[len(self.loss_names) + 1 :]))

    @torch.no_grad()
    def average_gradients(self) -> Tensor:
        """Averages the gradients over the ranks, in place; returns their norm. A collective."""
        grads = [p.grad for p in self.network.parameters() if p.grad is not None]
        if distributed.world_size() > 1:
            mean = distributed.mean(torch.cat([g.reshape(-1) for g in grads]))
            for g, part in zip(grads, mean.split([g.numel() for g in grads])):
                g.copy_(part.view(g.shape))
        return get_total_norm(grads, foreach=True)

    def step(self, scale: Tensor, applied: Tensor) -> None:
        """One update from gradients multiplied by ``scale``; where ``applied`` is false, on the device, no change."""
        self.optimizer.step_with(None, scale, applied)
