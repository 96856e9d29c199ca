"""Steps of AdamW and LAMB over all tensors of a model, with clipping and moving averages in the same pass.

A step reads and writes every tensor about once, whatever its parts: the gradients are multiplied by a factor as they
are read and stay as they are, and the averages take on the new weights while these are at hand. For ``n`` parameters of
``P`` bytes in all with one average, AdamW moves 9 P (it reads the gradients, and reads and writes weights, moments and
average) and LAMB 12 P: it needs the norm of a tensor's whole step before it moves the tensor's first element, so it
reads weights and moments twice.

Nothing is read by the host. Whether a step is made at all is decided by a tensor on the device, ``apply``.

    mean   = (beta1 m + (1 - beta1) g) / (1 - beta1^t)
    square = (beta2 v + (1 - beta2) g^2) / (1 - beta2^t)
    update = mean / (sqrt(square) + eps) + weight_decay w
    AdamW    w' = w - lr update
    LAMB     w' = w - lr max(|w|, least) / |update| update
    average' = average + rate (w' - average)

Sources: Loshchilov and Hutter 2019 ("Decoupled weight decay regularization"), Algorithm 2; You et al. 2020 ("Large
batch optimization for deep learning"), Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm_kernels._backend import autocast_off, resolve
from hpdm_kernels._checks import check_tensor
from hpdm_kernels.optimizer import ops, reference_backend
from hpdm_kernels.optimizer.checks import check_adam, check_lists, check_scalar, check_vector
from hpdm_kernels.optimizer.lists import Lists


class LambNorms(NamedTuple):
    """What a step of LAMB did, ``[n]`` each; of a step that was not applied norms are 0 and ratios 1."""

    weights: Tensor
    """Norms of the parameters before the step."""
    updates: Tensor
    """Norms of the Adam steps, before the learning rate and the ratio."""
    trust: Tensor
    """Factors of the Adam steps."""


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]] = (),
    *,
    steps: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    rates: Tensor | None = None,
    grad_scale: Tensor | None = None,
    apply: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW and of moving averages of the weights, in place.

    Args:
        params: ``n`` tensors of one dtype, fp32 or fp64, of any shapes, some of which may be empty, without gaps in
            memory.
        grads: as ``params`` in number and shape; all of their dtype, bf16 or fp16. They are not changed.
        exp_avgs, exp_avg_sqs: the first and second moments, as ``params`` in shape, dtype and strides.
        averages: for each length of average a list of ``n`` tensors, as ``params`` in shape, dtype and strides.
        steps: ``[n]`` fp32, how many steps each parameter has made; counted on by one.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        rates: ``[K]`` fp32 or fp64, how much of the new weights the ``K`` averages take on, ``1 - decay``; needed if
            there are averages.
        grad_scale: one number, fp32 or fp64, that multiplies the gradients (clipping); ``None`` for 1.
        apply: one truth value; where it is false not a bit of any argument changes, whatever the gradients hold.
            ``None`` for true.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``. None of them synchronizes with the GPU.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong number of tensors, shape, stride, device or number, or an unknown backend.
        RuntimeError: ``backend="triton"`` cannot run here.
    """
    lists = check_lists(params, grads, exp_avgs, exp_avg_sqs, averages)
    rate, adam = check_adam(lr, betas, eps, weight_decay)
    check_vector("steps", steps, len(lists.params), lists.params, (torch.float32,))
    rates = _rates(rates, lists)
    scale = check_scalar("grad_scale", grad_scale, 1.0, lists.params)
    applied = check_scalar("apply", apply, True, lists.params)
    chosen = _resolve(backend, "adamw_step", lists)
    with autocast_off(lists.params[0]):
        if chosen == "reference":
            return reference_backend.adamw(lists, steps, rates, scale, applied, rate, adam)
        ops.adamw_step(
            lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, _concatenated(lists), steps, rates, scale,
            applied, rate, *adam, chosen,
        )  # fmt: skip


@torch.no_grad()
def lamb_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    averages: Sequence[Sequence[Tensor]] = (),
    *,
    steps: Tensor,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    least_norms: Tensor | None = None,
    rates: Tensor | None = None,
    grad_scale: Tensor | None = None,
    apply: Tensor | None = None,
    sum_squares: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> LambNorms:
    """One step of LAMB and of moving averages of the weights, in place.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, averages, steps, lr, betas, eps, weight_decay, rates, grad_scale, apply,
            backend: as for :func:`adamw_step`.
        least_norms: ``[n]`` fp32 or fp64, the norms that the parameters count with at least; ``None`` for zeros.
        sum_squares: for tensors that are shared out: called once, between the two passes, with the squared norms
            ``[2, n]`` of this process's parts of the parameters and of their Adam steps; returns those of the whole.

    Returns:
        Norms and trust ratios, of the parameters' dtype.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`adamw_step`.
    """
    lists = check_lists(params, grads, exp_avgs, exp_avg_sqs, averages)
    rate, adam = check_adam(lr, betas, eps, weight_decay)
    n = len(lists.params)
    check_vector("steps", steps, n, lists.params, (torch.float32,))
    least = None if least_norms is None else check_vector("least_norms", least_norms, n, lists.params)
    rates = _rates(rates, lists)
    scale = check_scalar("grad_scale", grad_scale, 1.0, lists.params)
    applied = check_scalar("apply", apply, True, lists.params)
    chosen = _resolve(backend, "lamb_step", lists)
    with autocast_off(lists.params[0]):
        if chosen == "reference":
            squares = reference_backend.lamb_moments(lists, steps, scale, applied, adam)
        else:
            squares = ops.lamb_moments(
                lists.params, lists.grads, lists.exp_avgs, lists.exp_avg_sqs, steps, scale, applied, *adam, chosen
            )
        norms = _norms(squares if sum_squares is None else sum_squares(squares), least)
        if chosen == "reference":
            reference_backend.lamb_apply(lists, steps, norms.trust, rates, applied, rate, adam)
        else:
            ops.lamb_apply(
                lists.params, lists.exp_avgs, lists.exp_avg_sqs, _concatenated(lists), steps, norms.trust, rates,
                applied, rate, *adam, chosen,
            )  # fmt: skip
    return norms


def _resolve(backend: str, op: str, lists: Lists) -> str:
    """The backend for parameters, which kernels take in fp32, and for gradients, which may also be of 16 bits."""
    chosen = resolve(backend, op, lists.params[0], (torch.float32,))
    return resolve(backend, op, lists.grads[0]) if chosen == "triton" else chosen


def _norms(squares: Tensor, least: Tensor | None) -> LambNorms:
    """Norms and trust ratios from the squared norms ``[2, n]`` of weights and Adam steps."""
    weights, updates = squares.sqrt().unbind()
    counted = weights if least is None else weights.maximum(least.to(weights.dtype))
    return LambNorms(weights, updates, torch.where((counted > 0) & (updates > 0), counted / updates, 1.0))


def _rates(rates: Tensor | None, lists: Lists) -> Tensor:
    if rates is None and not lists.averages:
        return lists.params[0].new_zeros(0)
    return check_vector("rates", check_tensor("rates", rates, dtypes=None), len(lists.averages), lists.params)


def _concatenated(lists: Lists) -> list[Tensor]:
    return list(chain.from_iterable(lists.averages))
