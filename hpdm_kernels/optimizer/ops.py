"""The registered ops behind the optimizers: they change tensors in place and have no gradients.

LAMB is two ops. Between them the norms of tensors that are shared out over processes are completed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpdm_kernels._backend import custom_op
from hpdm_kernels.optimizer import torch_backend, triton_backend
from hpdm_kernels.optimizer.lists import Adam, Lists, grouped


@custom_op("adamw_step", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "averages", "steps"))
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    steps: Tensor,
    rates: Tensor,
    grad_scale: Tensor,
    apply: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: str,
) -> None:
    """A step of AdamW and of the averages, which are concatenated; see :func:`hpdm_kernels.adamw_step`."""
    lists = Lists(params, grads, exp_avgs, exp_avg_sqs, grouped(averages, len(params)))
    chosen = triton_backend if backend == "triton" else torch_backend
    chosen.adamw(lists, steps, rates, grad_scale, apply, lr, Adam(beta1, beta2, eps, weight_decay))


@adamw_step.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None


@custom_op("lamb_moments", mutates_args=("exp_avgs", "exp_avg_sqs", "steps"))
def lamb_moments(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    grad_scale: Tensor,
    apply: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: str,
) -> Tensor:
    """LAMB's first pass: new moments, and squared norms ``[2, n]`` of the weights and of the Adam steps."""
    chosen = triton_backend if backend == "triton" else torch_backend
    lists, adam = Lists(params, grads, exp_avgs, exp_avg_sqs, ()), Adam(beta1, beta2, eps, weight_decay)
    return chosen.lamb_moments(lists, steps, grad_scale, apply, adam)


@lamb_moments.register_fake
def _(params: Sequence[Tensor], *args: object, **kwargs: object) -> Tensor:
    return params[0].new_empty(2, len(params))


@custom_op("lamb_apply", mutates_args=("params", "averages"))
def lamb_apply(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Tensor],
    steps: Tensor,
    trust: Tensor,
    rates: Tensor,
    apply: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    backend: str,
) -> None:
    """LAMB's second pass: ``trust [n]`` times the Adam steps, and the averages, which are concatenated."""
    lists = Lists(params, (), exp_avgs, exp_avg_sqs, grouped(averages, len(params)))
    chosen = triton_backend if backend == "triton" else torch_backend
    chosen.lamb_apply(lists, steps, trust, rates, apply, lr, Adam(beta1, beta2, eps, weight_decay))


@lamb_apply.register_fake
def _(*args: object, **kwargs: object) -> None:
    return None
