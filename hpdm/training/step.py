"""One update of the weights, which training, its predicted cost and its measured cost share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.profiler import record_function

from hpdm.training.ema import EMA
from hpdm.training.fused import FusedOptimizer
from hpdm.training.parallel import full_tensor, gradients_averaged
from hpdm.training.second_player import SecondPlayer
from hpdm.training.sharded import shards


class Update(NamedTuple):
    """What an update returns, all of it on the device."""

    losses: Tensor
    """``[L]``, averaged over the micro-batches; with a second player its :meth:`SecondPlayer.values` are."""
    norm: Tensor
    """Norm of the gradient before clipping."""
    applied: Tensor
    """Whether the weights were changed, one truth value."""


Losses = Callable[[], Tensor]
"""Runs the forward pass of one micro-batch and returns its losses ``[L]``, whose mean is minimized."""


def update(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    micro_batches: Sequence[Losses],
    *,
    clip_norm: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    phase: Callable[[str], None] = lambda name: None,
    accept: Callable[[Tensor], Tensor] | None = None,
    second: SecondPlayer | None = None,
) -> Update:
    """Forward and backward of every micro-batch, then clipping, the optimizer and the moving average.

    Nothing waits for the device, but for an optimizer that is no :class:`hpdm.training.fused.FusedOptimizer`: it cannot
    take a step that is decided on the device.

    Args:
        network: the module that is called in training: the model, or its DDP wrapper.
        optimizer: of the network's parameters.
        ema: moving averages of the same parameters.
        micro_batches: the micro-batches, at least one, whose gradients are averaged.
        clip_norm: largest gradient norm; 0 for no clipping.
        autocast: makes the context of a forward pass, for automatic mixed precision.
        phase: called with ``"backward"`` before each backward pass and with ``"optimizer"`` before clipping.
        accept: called with the gradient's norm before clipping, whole on every rank; returns one truth value on the
            same device. Where it is false, the weights, the optimizer's state and the moving averages stay as they are.
            ``None``: every gradient is accepted.
        second: takes part in the step, with gradients that are clipped by themselves; the micro-batches return its
            ``values``. ``accept`` is called with the larger of both norms, and decides for both players.

    Raises:
        ValueError: no micro-batches.
    """
    optimizer.zero_grad(set_to_none=True)
    if second is not None:
        second.optimizer.zero_grad(set_to_none=True)
    total = None
    for i, losses_of in enumerate(micro_batches):
        with gradients_averaged(network, last=i == len(micro_batches) - 1):
            with record_function("forward"), autocast():
                losses = losses_of() / len(micro_batches)
            phase("backward")
            with record_function("backward"):
                (losses.mean() if second is None else second.minimized(losses)).backward()
        total = losses.detach() if total is None else total + losses.detach()
        del losses
    if total is None:
        raise ValueError("micro_batches: got none, expected at least one")
    phase("optimizer")
    with record_function("optimizer"):
        norm = larger = gradient_norm(network)
        if second is not None:
            other = second.average_gradients()
            larger = torch.maximum(norm, other)  # keeps a NaN
        applied = torch.ones_like(norm, dtype=torch.bool) if accept is None else accept(larger)
        scale = clip_factor(norm, clip_norm)
        if isinstance(optimizer, FusedOptimizer):
            optimizer.step_with(ema, scale, applied)
        elif accept is None or bool(applied):
            _step(network, optimizer, ema, scale)
        if second is not None:
            second.step(clip_factor(other, clip_norm), applied)
    return Update(total, norm, applied)


def gradient_norm(network: nn.Module) -> Tensor:
    """Norm of all gradients together, the same on every rank; a collective if they are sharded."""
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return full_tensor(get_total_norm(grads, foreach=True))


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """What a gradient of this norm is multiplied by, as by ``torch.nn.utils.clip_grad_norm_``; 1 for no clipping."""
    return ((clip_norm or float("inf")) / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def _step(network: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, scale: Tensor) -> None:
    """The step of any optimizer and the moving average, with gradients multiplied by ``scale``."""
    torch._foreach_mul_(shards(p.grad for p in network.parameters() if p.grad is not None), scale)
    optimizer.step()
    ema.update(network)
