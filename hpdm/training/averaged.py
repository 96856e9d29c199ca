"""The moving average of the weights in place of the weights, for validation and sample grids during training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hpdm.training.ema import EMA
from hpdm.training.sharded import shards


@contextmanager
def averaged_weights(model: nn.Module, ema: EMA, number: int = 0) -> Iterator[None]:
    """Within the block the model, in eval mode, has an average's weights; after it, its own again, bit for bit.

    Weights and average change places tensor by tensor, which takes the memory of the largest tensor and not that of a
    second model. Sharded tensors are exchanged shard by shard, so every rank enters the block, and calls the model as
    often as the others. Neither the optimizer nor ``ema`` may be used within the block.

    Args:
        model: whose weights are averaged.
        ema: their averages.
        number: of the average, 0 for the first.
    """
    training = model.training
    average = ema.shadows[number]
    _exchange(model, average)
    model.eval()
    try:
        yield
    finally:
        _exchange(model, average)
        model.train(training)


@torch.no_grad()
def _exchange(model: nn.Module, averages: Mapping[str, Tensor]) -> None:
    """Exchanges the contents of parameters and average."""
    # A forward pass without a backward leaves some modules with whole weights, which would outlive the exchange.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    names, parameters = zip(*model.named_parameters())
    # In place: optimizer, DDP and FSDP hold on to the parameters' storages.
    for weight, average in zip(shards(parameters), shards(averages[name] for name in names)):
        before = weight.clone()
        weight.copy_(average)
        average.copy_(before)
