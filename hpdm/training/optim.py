"""The optimizer of the paper (LAMB), its learning-rate schedule, and an exponential moving average of the weights.

Optimizer and moving average treat parameters that are sharded over ranks (``DTensor``) like whole ones: each rank
updates its own shards, and only LAMB's norms are summed over the shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor: its shard of a ``DTensor``, else the whole tensor. Call it under ``no_grad``."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def _norms(local: list[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Norms of whole tensors from this rank's parts ``local``, sharded as ``like``; one reduction for all tensors."""
    norms = torch.stack(torch._foreach_norm(local))
    if isinstance(like[0], DTensor):
        norms.square_()
        for axis, placement in enumerate(like[0].placements):
            if placement.is_shard():
                dist.all_reduce(norms, group=like[0].device_mesh.get_group(axis))
        norms.sqrt_()
    return norms


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, Algorithm 2): Adam whose step is rescaled per tensor to the tensor's own norm.

    PyTorch has no LAMB. This one uses foreach operations: a handful of launches for all parameters, and two reductions
    per group if parameters are sharded.

    Args:
        params: parameters or groups of them; within a group all are whole, or all are sharded alike. A group with
            ``adapt=False`` takes plain Adam steps (biases and norms).
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, inside the rescaled step.

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
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr, eps, weight_decay: got {lr}, {eps}, {weight_decay}, expected all >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: got {betas}, expected both in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
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
        # Tensors of a group are stepped together, except those that got no gradient in some steps.
        counts = [float(self.state[p]["step"]) for p in params]
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, [math.sqrt(1 - beta2**n) for n in counts])
        torch._foreach_add_(root, group["eps"])
        update = torch._foreach_div(first, [1 - beta1**n for n in counts])
        torch._foreach_div_(update, root)
        if group["weight_decay"]:
            torch._foreach_add_(update, local, alpha=group["weight_decay"])
        if group["adapt"]:
            weights, updates = _norms(local, params), _norms(list(update), params)
            trust = torch.where((weights > 0) & (updates > 0), weights / updates, 1.0)
            torch._foreach_mul_(update, list(trust.unbind()))
        torch._foreach_add_(local, update, alpha=-group["lr"])


def make_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """``"adamw"`` or ``"lamb"`` over the model; biases, norms and other vectors get no decay and no rescaling.

    Raises:
        ValueError: unknown name.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, foreach=True)
    if name == "lamb":
        groups[1]["adapt"] = False
        return Lamb(groups, lr=lr, weight_decay=weight_decay)
    raise ValueError(f"optimizer: got {name!r}, expected 'adamw' or 'lamb'")


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to ``peak`` over ``warmup`` steps, then a cosine to 0 at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class EMA:
    """Exponential moving average of a model's parameters, sharded like them.

    Shard the model before making its average.

    The decay is ``min(decay, (1 + n) / (10 + n))`` at update ``n``, so that the random start is forgotten quickly.

    Args:
        model: whose parameters are averaged.
        decay: limit of the decay, in [0, 1).

    Raises:
        ValueError: decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay: got {decay}, expected a number in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's current parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(shards(self.shadow.values()), shards(model.parameters()), 1 - decay)
