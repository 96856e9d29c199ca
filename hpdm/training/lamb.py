"""LAMB (You et al. 2020), the paper's optimizer, and what it does with matrices that start at zero.

LAMB takes a step whose length is a share of the weights' own norm. A matrix that starts at zero, as the detokenizer
and all modulations do (adaLN-Zero), has none. Its norm can then grow by the factor ``1 + lr`` a step at most: with a
warm-up of 10,000 steps (Table 8) it takes more than 6,000 steps to reach a useful size, whatever the gradients. So for
a matrix that starts at zero the norm counts as that of Xavier's initialization (:func:`xavier_norm`) until it is
larger: its steps are as long as those of a matrix of its shape that starts at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpdm.training.sharded import buckets, shards, whole_norms


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


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, Algorithm 2): Adam whose step is rescaled per tensor to the tensor's own norm.

    PyTorch has no LAMB. This one uses foreach operations on buckets of tensors (:func:`buckets`): a handful of launches
    per bucket, two reductions if parameters are sharded, and temporaries of two buckets instead of two models.

    Args:
        params: parameters or groups of them; within a group all are whole, or all are sharded alike. A group with
            ``adapt=False`` takes plain Adam steps (biases and norms).
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, inside the rescaled step.
        least_norms: for some tensors, the norm that their weights count with at least. The optimizer's state does not
            keep it.

    Raises:
        ValueError: a negative rate, decay or eps, or a beta outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        least_norms: Mapping[Any, float] | None = None,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr, eps, weight_decay: got {lr}, {eps}, {weight_decay}, expected all >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, expected both in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True})
        self.least_norms = dict(least_norms or {})
        self.last: list[StepNorms] = []
        """Of the last step, an entry for each bucket that is rescaled."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.last = []
        for group in self.param_groups:
            for params in buckets([p for p in group["params"] if p.grad is not None]):
                self._update(group, params)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
            state["step"] += 1
        beta1, beta2 = group["betas"]
        local = shards(params)
        grads = shards(p.grad for p in params if p.grad is not None)
        first = shards(self.state[p]["exp_avg"] for p in params)
        second = shards(self.state[p]["exp_avg_sq"] for p in params)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        # Tensors are stepped together, except those that got no gradient in some steps.
        counts = [float(self.state[p]["step"]) for p in params]
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, [math.sqrt(1 - beta2**n) for n in counts])
        torch._foreach_add_(root, group["eps"])
        update = torch._foreach_div(first, [1 - beta1**n for n in counts])
        torch._foreach_div_(update, root)
        if group["weight_decay"]:
            torch._foreach_add_(update, local, alpha=group["weight_decay"])
        if group["adapt"]:
            trust = self._trust(group["lr"], params, local, list(update))
            torch._foreach_mul_(update, list(trust.unbind()))
        torch._foreach_add_(local, update, alpha=-group["lr"])

    def _trust(self, rate: float, params: list[Tensor], local: list[Tensor], update: list[Tensor]) -> Tensor:
        """Factors ``[n]`` of the Adam steps ``update``."""
        weights, updates = whole_norms(local, params), whole_norms(update, params)
        counted, least = weights, [self.least_norms.get(p, 0.0) for p in params]
        if any(least):
            counted = weights.maximum(torch.tensor(least, device=weights.device, dtype=weights.dtype))
        ratio = torch.where((counted > 0) & (updates > 0), counted / updates, 1.0)
        self.last.append(StepNorms(params, weights, updates * ratio * rate, ratio))
        return ratio
