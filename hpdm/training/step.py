"""One update of the weights, which training, its predicted cost and its measured cost share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.profiler import record_function

from hpdm.training.ema import EMA
from hpdm.training.parallel import gradients_averaged


class Update(NamedTuple):
    """What an update returns."""

    losses: Tensor
    """``[L]``, averaged over the micro-batches."""
    norm: Tensor
    """Norm of the gradient before clipping."""
    applied: bool
    """Whether the weights were changed."""


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
    accept: Callable[[Tensor], bool] = lambda norm: True,
) -> Update:
    """Forward and backward of every micro-batch, then clipping, the optimizer and the moving average.

    Args:
        network: the module that is called in training: the model, or its DDP wrapper.
        optimizer: of the network's parameters.
        ema: moving averages of the same parameters.
        micro_batches: the micro-batches, at least one, whose gradients are averaged.
        clip_norm: largest gradient norm; 0 for no clipping.
        autocast: makes the context of a forward pass, for automatic mixed precision.
        phase: called with ``"backward"`` before each backward pass and with ``"optimizer"`` before clipping.
        accept: called with the gradient's norm before clipping; where it returns false, the weights, the optimizer's
            state and the moving averages stay as they are.

    Raises:
        ValueError: no micro-batches.
    """
    optimizer.zero_grad(set_to_none=True)
    total = None
    for i, losses_of in enumerate(micro_batches):
        with gradients_averaged(network, last=i == len(micro_batches) - 1):
            with record_function("forward"), autocast():
                losses = losses_of() / len(micro_batches)
            phase("backward")
            with record_function("backward"):
                losses.mean().backward()
        total = losses.detach() if total is None else total + losses.detach()
        del losses
    if total is None:
        raise ValueError("micro_batches: got none, expected at least one")
    phase("optimizer")
    with record_function("optimizer"):
        norm = clip_grad_norm_(network.parameters(), clip_norm or float("inf"), foreach=True)
        applied = accept(norm)
        if applied:
            optimizer.step()
            ema.update(network)
    return Update(total, norm, applied)
