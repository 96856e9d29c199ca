"""One training step over several processes: replicated (DDP) or sharded (FSDP2).

Either way every process calls the network on its own clips and the gradients are averaged; what differs is where
parameters, gradients, moments and the moving average lie: whole in every process, or a shard in each.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hpdm import distributed
from hpdm.patch.model import HPDM

Parallel = Literal["ddp", "fsdp"]


def parallelise(model: HPDM, how: Parallel, device: torch.device, compiled: bool = False) -> nn.Module:
    """Replicates or shards ``model`` over the processes, in place; returns what to call for a training step.

    Sharded are the blocks one by one, so that a process holds whole weights of one block at a time, and their fusions
    on their own, because the levels are fused before the rest of a block is called.

    Args:
        model: on ``device``, with the same weights everywhere.
        how: ``"ddp"`` or ``"fsdp"``; with one process, neither does anything.
        device: this process's.
        compiled: compile the network, whole or, where blocks are sharded, block by block.
    """
    count = distributed.world_size()
    sharded = count > 1 and how == "fsdp"
    if compiled:
        for part in model.rin_blocks if sharded else [model]:
            part.compile()
    if count == 1:
        return model
    if not sharded:
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    # Said of every call of a fusion; what a block makes of its tokens is written nowhere in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (count,))
    for block in model.rin_blocks:
        if block.fusion is not None:
            # Called once per level: gathered once, not once per level.
            fully_shard(block.fusion, mesh=mesh, reshard_after_forward=False)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def gradients_averaged(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Within it, a backward pass averages the gradients over the processes only if ``last`` of an accumulation."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    return nullcontext()
