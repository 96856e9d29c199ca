"""AdamW (Loshchilov and Hutter 2019) in one pass over weights, moments and moving averages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

import hpdm_kernels
from hpdm.training.fused import Along, FusedOptimizer


class AdamW(FusedOptimizer):
    """AdamW with the state of PyTorch's, see :class:`hpdm.training.fused.FusedOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        backend: of :func:`hpdm_kernels.adamw_step`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, backend)

    def _step_group(self, number: int, group: dict[str, Any], params: list[Tensor], along: Along) -> None:
        own = self._own(number, params)
        hpdm_kernels.adamw_step(
            own.params, own.grads, own.first, own.second, along.averages, steps=own.steps, lr=group["lr"],
            betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"], rates=along.rates,
            grad_scale=along.grad_scale, apply=along.apply, backend=self.backend,
        )  # fmt: skip
