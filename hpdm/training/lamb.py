"""LAMB (You et al. 2020), the paper's optimizer, and what it does with matrices that start at zero.

LAMB takes a step whose length is a share of the weights' own norm. A matrix that starts at zero, as the detokenizer
and all modulations do (adaLN-Zero), has none. Its norm can then grow by the factor ``1 + lr`` a step at most: with a
warm-up of 10,000 steps (Table 8) it takes more than 6,000 steps to reach a useful size, whatever the gradients. So for
a matrix that starts at zero the norm counts as that of Xavier's initialization (:func:`xavier_norm`) until it is
larger: its steps are as long as those of a matrix of its shape that starts at random.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hpdm_kernels
from hpdm.training.fused import Along, FusedOptimizer
from hpdm.training.sharded import sum_over_shards


def xavier_norm(shape: Sequence[int]) -> float:
    """Expected norm of a matrix or a convolution's weight ``[out, in, ...]`` after Xavier's initialization.

    Its entries have the variance ``2 / (fan_in + fan_out)`` (Glorot and Bengio 2010, eq. 16).
    """
    fan_out, fan_in = (math.prod(shape) // shape[axis] for axis in (1, 0))
    return math.sqrt(math.prod(shape) * 2 / (fan_in + fan_out))


class StepNorms(NamedTuple):
    """What a step of LAMB did to some tensors, ``[n]`` each."""

    params: list[Tensor]
    weights: Tensor
    """Norms of the tensors before the step."""
    updates: Tensor
    """Norms of the changes."""
    trust: Tensor
    """Factors of the Adam steps."""


class Lamb(FusedOptimizer):
    """LAMB (You et al. 2020, Algorithm 2): Adam whose step is rescaled per tensor to the tensor's own norm.

    PyTorch has no LAMB. This one is two passes over the tensors (:func:`hpdm_kernels.lamb_step`), with one reduction
    between them if they are sharded; see :class:`hpdm.training.fused.FusedOptimizer`.

    Args:
        params: parameters or groups of them; within a group all are whole, or all are sharded alike. A group with
            ``adapt=False`` takes plain Adam steps (biases and norms).
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, inside the rescaled step.
        least_norms: for some tensors, the norm that their weights count with at least. The optimizer's state does not
            keep it.
        backend: of :func:`hpdm_kernels.lamb_step`.

    Raises:
        ValueError: a negative rate, decay or eps, a beta outside [0, 1), or an unknown backend.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        least_norms: Mapping[Any, float] | None = None,
        backend: str = "auto",
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr, eps, weight_decay: got {lr}, {eps}, {weight_decay}, expected all >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, expected both in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True}
        super().__init__(params, defaults, backend)
        self.least_norms = dict(least_norms or {})
        self._last: dict[int, StepNorms] = {}
        self._least: dict[int, tuple[list[Tensor], Tensor]] = {}

    @property
    def last(self) -> list[StepNorms]:
        """Of the last step that was applied, an entry for each group that is rescaled."""
        return list(self._last.values())

    def _step_group(self, number: int, group: dict[str, Any], params: list[Tensor], along: Along) -> None:
        own = self._own(number, params)
        settings: dict[str, Any] = {
            "steps": own.steps, "lr": group["lr"], "betas": group["betas"], "eps": group["eps"],
            "weight_decay": group["weight_decay"], "rates": along.rates, "grad_scale": along.grad_scale,
            "apply": along.apply, "backend": self.backend,
        }  # fmt: skip
        lists = (own.params, own.grads, own.first, own.second, along.averages)
        if not group["adapt"]:
            hpdm_kernels.adamw_step(*lists, **settings)
            return
        norms = hpdm_kernels.lamb_step(
            *lists,
            least_norms=self._least_norms(number, params, own.steps.device),
            sum_squares=partial(sum_over_shards, like=params),
            **settings,
        )
        self._remember(number, params, norms, group["lr"], along.apply)

    def _least_norms(self, number: int, params: list[Tensor], device: torch.device) -> Tensor | None:
        """``[n]``, made once for a set of parameters; ``None`` without any."""
        if not self.least_norms:
            return None
        known, norms = self._least.get(number, ([], torch.empty(0)))
        if len(known) != len(params) or any(a is not b for a, b in zip(known, params)):
            norms = torch.tensor([self.least_norms.get(p, 0.0) for p in params], dtype=torch.float64).to(device)
            self._least[number] = params, norms
        return norms

    def _remember(
        self, number: int, params: list[Tensor], norms: hpdm_kernels.LambNorms, rate: float, apply: Tensor | None
    ) -> None:
        """Keeps what a step did, if it was applied."""
        new = StepNorms(params, norms.weights, norms.updates * norms.trust * rate, norms.trust)
        before = self._last.get(number)
        if before is not None and apply is not None and all(a is b for a, b in zip(before.params, params)):
            kept = [torch.where(apply, a, b) for a, b in zip(new[1:], before[1:])]
            new = StepNorms(params, *kept)
        self._last[number] = new
