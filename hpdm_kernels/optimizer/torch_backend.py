"""The optimizers in PyTorch: parts of the tensors pass through the cache once and get all that a step does to them.

Adam is PyTorch's own fused kernel, one read and one write of each tensor. LAMB's first pass gets the Adam step from the
same kernel, as the change of zeros at the rate -1. On the CPU ``apply``, factors and rates are read, which costs
nothing there. On a GPU nothing is read: a step is made and taken back where it must not be applied, part by part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hpdm_kernels.optimizer.lists import Adam, Lists, flat, pieces

PIECE = 2**18
"""Elements of each list in the cache at a time: with six lists of fp32 about 6 MB."""


def _is_skipped(apply: Tensor) -> bool:
    """Whether a step is known not to be applied, where knowing it costs nothing."""
    return apply.device.type == "cpu" and not bool(apply)


@contextmanager
def _taken_back_unless(apply: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Takes back what the block does to ``tensors`` where ``apply``, on a device, is false."""
    if apply.device.type == "cpu":
        yield
        return
    before = [t.clone() for t in tensors]
    yield
    for t, old in zip(tensors, before):
        t.copy_(torch.where(apply, t, old))


def _scaled(grads: list[Tensor], scale: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gradients times ``scale``, in the parameters' dtype."""
    if grads[0].dtype != dtype:
        grads = [g.to(dtype) for g in grads]
    if scale.device.type != "cpu":
        return list(torch._foreach_mul(grads, scale.to(dtype)))
    factor = float(scale)
    return grads if factor == 1 else list(torch._foreach_mul(grads, factor))


def _average(averages: Sequence[list[Tensor]], params: list[Tensor], rates: Tensor) -> None:
    if rates.device.type == "cpu":
        for average, rate in zip(averages, rates.tolist()):
            torch._foreach_lerp_(average, params, rate)
        return
    for tensors, weight in zip(averages, rates.to(params[0].dtype)):
        for t, p in zip(tensors, params):
            t.lerp_(p, weight)


def _fused_adam(
    params: list[Tensor], grads: list[Tensor], first: list[Tensor], second: list[Tensor], counts: list[Tensor],
    lr: float, weight_decay: float, adam: Adam,
) -> None:  # fmt: skip
    torch._fused_adamw_(
        params, grads, first, second, [], counts, amsgrad=False, maximize=False,
        lr=lr, beta1=adam.beta1, beta2=adam.beta2, eps=adam.eps, weight_decay=weight_decay,
    )  # fmt: skip


def _squares(tensors: list[Tensor]) -> list[Tensor]:
    """Squared norms. PyTorch's norms add up fp32 numbers one after another and err ten times as much."""
    return [torch.dot(t, t) for t in map(flat, tensors)]


def adamw(lists: Lists, steps: Tensor, rates: Tensor, scale: Tensor, apply: Tensor, lr: float, adam: Adam) -> None:
    """A step of AdamW and of the averages, in place, where ``apply`` holds."""
    if _is_skipped(apply):
        return
    steps.add_(apply)
    counts = steps.unbind()
    for owners, (params, grads, first, second, *averages) in pieces(lists.columns, PIECE):
        with _taken_back_unless(apply, [*params, *first, *second, *(t for average in averages for t in average)]):
            grads = _scaled(grads, scale, params[0].dtype)
            _fused_adam(params, grads, first, second, [counts[i] for i in owners], lr, adam.weight_decay, adam)
            _average(averages, params, rates)


def lamb_moments(lists: Lists, steps: Tensor, scale: Tensor, apply: Tensor, adam: Adam) -> Tensor:
    """New moments in place; squared norms ``[2, n]`` of the weights and of the Adam steps, zeros if not applied."""
    n = len(lists.params)
    squares = steps.new_zeros(2, n, dtype=lists.params[0].dtype)
    if _is_skipped(apply):
        return squares
    steps.add_(apply)
    counts, sums, of_sums = steps.unbind(), [], []
    for owners, (params, grads, first, second) in pieces(lists._replace(averages=()).columns, PIECE):
        with _taken_back_unless(apply, [*first, *second]):
            grads, update = _scaled(grads, scale, params[0].dtype), [torch.zeros_like(p) for p in params]
            _fused_adam(update, grads, first, second, [counts[i] for i in owners], -1.0, 0.0, adam)
        if adam.weight_decay:
            torch._foreach_add_(update, params, alpha=adam.weight_decay)
        sums.append(torch.stack(_squares(params) + _squares(update)).view(2, -1))
        of_sums += owners
    if not sums:
        return squares
    parts = torch.cat(sums, dim=1)
    counted = [0] * n
    for i in of_sums:
        counted[i] += 1
    if all(count == 1 for count in counted):
        return torch.where(apply, parts, squares)
    # Not by index_add_, whose order is not fixed on a GPU.
    whole = torch.stack([part.sum(1) for part in parts.split(counted, dim=1)], dim=1)
    return torch.where(apply, whole, squares)


def lamb_apply(lists: Lists, steps: Tensor, trust: Tensor, rates: Tensor, apply: Tensor, lr: float, adam: Adam) -> None:
    """The weights' step, ``trust [n]`` times the Adam steps, and that of the averages, in place."""
    if _is_skipped(apply):
        return
    dtype, counts = lists.params[0].dtype, steps.double()
    of_first = (1 - adam.beta1**counts).to(dtype).unbind()
    of_second = (1 - adam.beta2**counts).sqrt().to(dtype).unbind()
    factors = trust.to(dtype).unbind()
    for owners, (params, first, second, *averages) in pieces(lists._replace(grads=()).columns, PIECE):
        with _taken_back_unless(apply, [*params, *(t for average in averages for t in average)]):
            root = list(torch._foreach_sqrt(second))
            torch._foreach_div_(root, [of_second[i] for i in owners])
            torch._foreach_add_(root, adam.eps)
            update = list(torch._foreach_div(first, [of_first[i] for i in owners]))
            torch._foreach_div_(update, root)
            if adam.weight_decay:
                torch._foreach_add_(update, params, alpha=adam.weight_decay)
            torch._foreach_mul_(update, [factors[i] for i in owners])
            torch._foreach_add_(params, update, alpha=-lr)
            _average(averages, params, rates)
