"""Muon (Jordan et al. 2024) for the matrices inside a network, AdamW for everything else.

Muon's step of a matrix is its momentum with all singular values made about equal, so that directions which gradients
seldom show move as far as the others. It is meant for matrices from hidden features to hidden features: embeddings, the
first and the last layer, biases and norms take AdamW's steps. PyTorch has Muon, but for matrices alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, with one state and one list of groups.

    A matrix' step is as long as AdamW's at the same rate (Liu et al. 2025, "Muon is scalable for LLM training",
    section 2.2): the entries of a step have a root mean square of about ``0.2 lr``.

    Args:
        hidden: matrices ``[out, in]`` that Muon steps.
        others: groups of the other parameters, for AdamW.
        lr: learning rate.
        weight_decay: decoupled; of AdamW's groups that do not have their own.

    Raises:
        ValueError: nothing for Muon, a hidden parameter that is no matrix, or one that is sharded.
    """

    def __init__(
        self, hidden: Sequence[Tensor], others: Sequence[dict[str, Any]], lr: float, weight_decay: float
    ) -> None:
        if not hidden:
            raise ValueError("optimizer: got 'muon' for a model without hidden matrices, expected 'adamw' or 'lamb'")
        if any(p.ndim != 2 for p in hidden):
            raise ValueError(f"hidden: got shapes {[tuple(p.shape) for p in hidden if p.ndim != 2]}, expected matrices")
        if any(isinstance(p, DTensor) for p in hidden):
            raise ValueError(
                "optimizer: got 'muon' with sharded weights, expected 'adamw' or 'lamb', or parallel='ddp'"
            )
        self.parts = (
            Muon(list(hidden), lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            AdamW(list(others), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True),
        )
        # The groups are the parts' own dictionaries, and the state is shared: what is set here is set there.
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    @property
    def hidden(self) -> list[Tensor]:
        """The matrices that Muon steps."""
        return list(self.parts[0].param_groups[0]["params"])

    def update_norm(self, p: Tensor) -> float:
        """Length of a step of the hidden matrix ``p`` if all its singular values were exactly equal.

        Muon's iteration leaves them between about 0.5 and 1.5 of that.
        """
        return float(self.parts[0].param_groups[0]["lr"]) * 0.2 * math.sqrt(p.shape[0] * p.shape[1])
