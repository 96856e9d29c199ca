"""One training step over several ranks: replicated (DDP) or sharded (FSDP2).

Either way every rank calls the network on its own clips and the gradients are averaged. Parameters, gradients,
optimizer state and moving average are whole on every rank (DDP), or each rank holds a shard (FSDP2).
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hpdm import distributed
from hpdm.recipe import Parallel
from hpdm.system import System


def parallelize(system: System, model: nn.Module, how: Parallel, device: torch.device, compiled: bool) -> nn.Module:
    """Replicates or shards ``model`` over the ranks, in place; returns the module to call in a training step.

    The parts that the system names are sharded one by one, so that a rank holds whole weights of one part at a time.

    Args:
        system: the model's system; it names the modules that are sharded one by one.
        model: on ``device``, with the same weights on every rank.
        how: ``"ddp"`` or ``"fsdp"``; with one rank, neither does anything.
        device: this rank's.
        compiled: compile the model, whole or, where it is sharded, part by part.
    """
    world_size = distributed.world_size()
    sharded = world_size > 1 and how == "fsdp"
    if compiled:
        for part in system.compiled_modules(model) if sharded else [model]:
            part.compile()
    if world_size == 1:
        return model
    if not sharded:
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
        )
    # FSDP2 warns at every call of a part that returns a view; no part changes its inputs or outputs in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (world_size,))
    for part, reshard in system.sharded_modules(model):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)
    return model


def gradients_averaged(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Within the block, a backward pass averages gradients over the ranks only if it is the step's ``last`` one."""
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(last)
    return nullcontext()


def full_tensor(t: Tensor) -> Tensor:
    """Gathers a DTensor; a collective, to be called on every rank. Any other tensor is returned as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t
