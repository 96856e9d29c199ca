"""The optimizers tensor by tensor, by the formulas of :mod:`hpdm_kernels.reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm_kernels import reference
from hpdm_kernels.optimizer.lists import Adam, Lists


def _set(apply: Tensor, t: Tensor, value: Tensor) -> None:
    t.copy_(torch.where(apply, value, t))


def _moments(lists: Lists, i: int, scale: Tensor, apply: Tensor, adam: Adam) -> None:
    first, second = lists.exp_avgs[i], lists.exp_avg_sqs[i]
    grad = lists.grads[i].to(first.dtype) * scale.to(first.dtype)
    new_first, new_second = reference.adam_moments(first, second, grad, adam.beta1, adam.beta2)
    _set(apply, first, new_first)
    _set(apply, second, new_second)


def _update(lists: Lists, i: int, steps: Tensor, adam: Adam) -> Tensor:
    return reference.adam_update(lists.params[i], lists.exp_avgs[i], lists.exp_avg_sqs[i], steps[i], *adam)


def _move(lists: Lists, i: int, update: Tensor, rates: Tensor, apply: Tensor, factor: float | Tensor) -> None:
    param = lists.params[i]
    _set(apply, param, param - factor * update)
    for average, rate in zip(lists.averages, rates.to(param.dtype)):
        _set(apply, average[i], torch.lerp(average[i], param, rate))


def adamw(lists: Lists, steps: Tensor, rates: Tensor, scale: Tensor, apply: Tensor, lr: float, adam: Adam) -> None:
    """A step of AdamW and of the averages, in place, where ``apply`` holds."""
    steps.add_(apply)
    for i in range(len(lists.params)):
        _moments(lists, i, scale, apply, adam)
        _move(lists, i, _update(lists, i, steps, adam), rates, apply, lr)


def lamb_moments(lists: Lists, steps: Tensor, scale: Tensor, apply: Tensor, adam: Adam) -> Tensor:
    """New moments in place; squared norms ``[2, n]`` of the weights and of the Adam steps, zeros if not applied."""
    steps.add_(apply)
    squares = []
    for i, param in enumerate(lists.params):
        _moments(lists, i, scale, apply, adam)
        squares.append(torch.stack((param.square().sum(), _update(lists, i, steps, adam).square().sum())))
    return torch.where(apply, torch.stack(squares, dim=1), 0.0)


def lamb_apply(lists: Lists, steps: Tensor, trust: Tensor, rates: Tensor, apply: Tensor, lr: float, adam: Adam) -> None:
    """The weights' step, ``trust [n]`` times the Adam steps, and that of the averages, in place."""
    for i, param in enumerate(lists.params):
        _move(lists, i, _update(lists, i, steps, adam), rates, apply, lr * trust[i].to(param.dtype))
