"""Optimizers whose step is an op of :mod:`hpdm_kernels`, which takes clipping and the moving averages along."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpdm.training.ema import EMA
from hpdm.training.sharded import shards
from hpdm_kernels._backend import check_backend


class Along(NamedTuple):
    """What a step takes along besides the optimizer's own work, as the ops of :mod:`hpdm_kernels` call it."""

    averages: list[list[Tensor]]
    rates: Tensor | None
    grad_scale: Tensor | None
    apply: Tensor | None


class Own(NamedTuple):
    """This rank's parts of some parameters and of what belongs to them."""

    params: list[Tensor]
    grads: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: Tensor
    """``[n]`` fp32: how many steps each has made."""


class FusedOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer with two moments whose step reads and writes each tensor once or twice, whatever belongs to it.

    :meth:`step` is PyTorch's protocol. :meth:`step_with` also multiplies the gradients by a factor, moves the averages
    of the weights, and does nothing where a tensor on the device says so. Neither waits for the device. Sharded
    parameters are stepped shard by shard.

    Args:
        params: parameters or groups of them; within a group all are whole, or all are sharded alike.
        defaults: values of groups that do not have their own.
        backend: of the ops of :mod:`hpdm_kernels`.

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], backend: str) -> None:
        super().__init__(params, defaults)
        self.backend = check_backend(backend)
        self._counts: dict[int, tuple[list[Tensor], Tensor]] = {}
        """By number of the group: the parameters' entries ``step``, which are views of one tensor, and that tensor."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_with(None)
        return loss

    @torch.no_grad()
    def step_with(self, ema: EMA | None, grad_scale: Tensor | None = None, apply: Tensor | None = None) -> None:
        """One update of the parameters that have gradients, and of the moving averages of all.

        Args:
            ema: averages of the same parameters; ``None`` for none.
            grad_scale: one number on the parameters' device that multiplies the gradients, which stay as they are.
            apply: one truth value on the parameters' device; where it is false, nothing at all changes.
        """
        rates = None if ema is None else ema.rates()
        stepped: set[Tensor] = set()
        for number, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                averages = [] if ema is None else ema.averages_of(params)
                along = Along([shards(average) for average in averages], rates, grad_scale, apply)
                self._step_group(number, group, params, along)
                stepped.update(params)
        if ema is not None:
            ema.finish(stepped, apply)

    @abstractmethod
    def _step_group(self, number: int, group: dict[str, Any], params: list[Tensor], along: Along) -> None:
        """Steps the parameters of a group that have gradients."""

    def _own(self, number: int, params: list[Tensor]) -> Own:
        """This rank's parts of parameters of a group; makes the state of those that have none."""
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        local = shards(params)
        return Own(
            local,
            shards(p.grad for p in params if p.grad is not None),
            shards(self.state[p]["exp_avg"] for p in params),
            shards(self.state[p]["exp_avg_sq"] for p in params),
            self._steps(number, params, local[0].device),
        )

    def _steps(self, number: int, params: list[Tensor], device: torch.device) -> Tensor:
        """The parameters' entries ``step`` as one tensor ``[n]`` on the device, which they are views of."""
        entries = [self.state[p]["step"] for p in params]
        known, counts = self._counts.get(number, ([], torch.empty(0)))
        # Entries are exchanged where a state is loaded, and others are asked for where a gradient is missing.
        if len(known) != len(entries) or any(a is not b for a, b in zip(known, entries)):
            counts = torch.stack([entry.to(device, torch.float32).reshape(()) for entry in entries])
            known = list(counts.unbind())
            for p, entry in zip(params, known):
                self.state[p]["step"] = entry
            self._counts[number] = known, counts
        return counts
