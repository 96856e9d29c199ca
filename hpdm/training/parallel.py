"""One training step over several ranks: replicated (DDP), sharded (FSDP2), or both (HSDP).

Every rank calls the network on its own clips and the gradients are averaged. Parameters, gradients, optimizer state and
moving average are whole on every rank (DDP), or each rank holds a shard of them: one of as many as there are ranks
(FSDP2), or one of as many as a node has, and every node holds all of them (HSDP). So with HSDP weights are gathered
inside of a node, and only gradients, a shard per rank and once per step, cross the network between the nodes.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from hpdm import distributed
from hpdm.recipe import Parallel
from hpdm.system import System


def shard_size(how: Parallel, world_size: int, shard_ranks: int | None = None) -> int:
    """The number of ranks that share one copy of the weights: 1 with DDP, all with FSDP2, those of a node with HSDP.

    Args:
        how: ``"ddp"``, ``"fsdp"`` or ``"hsdp"``.
        world_size: number of ranks. A rank alone shares with none.
        shard_ranks: the number for HSDP; ``None`` for the ranks of this node, as ``torchrun`` tells them.

    Raises:
        ValueError: a number that does not divide ``world_size``, or none for ranks that ``torchrun`` has not started.
    """
    if how != "hsdp" or world_size == 1:
        return world_size if how == "fsdp" else 1
    if shard_ranks is None:
        if "LOCAL_WORLD_SIZE" not in os.environ:
            raise ValueError(
                "shard_ranks: got none, and torchrun's LOCAL_WORLD_SIZE is not set, expected the number of processes "
                "that share one copy of the weights"
            )
        shard_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    if world_size % shard_ranks:
        raise ValueError(f"shard_ranks: got {shard_ranks}, expected a divisor of the number of processes, {world_size}")
    return shard_ranks


def parallelize(
    system: System,
    model: nn.Module,
    how: Parallel,
    device: torch.device,
    compiled: bool,
    shard_ranks: int | None = None,
) -> nn.Module:
    """Replicates or shards ``model`` over the ranks, in place; returns the module to call in a training step.

    The parts that the system names are sharded one by one, so that a rank holds whole weights of one part at a time.

    Args:
        system: the model's system; it names the modules that are sharded one by one.
        model: on ``device``, with the same weights on every rank.
        how: ``"ddp"``, ``"fsdp"`` or ``"hsdp"``; with one rank, none does anything.
        device: this rank's.
        compiled: compile the model, whole or, where it is sharded, part by part.
        shard_ranks: as for :func:`shard_size`.

    Raises:
        ValueError: as :func:`shard_size`.
    """
    world_size = distributed.world_size()
    sharded = world_size > 1 and how != "ddp"
    if compiled:
        for part in system.compiled_modules(model) if sharded else [model]:
            part.compile()
    if world_size == 1:
        return model
    if not sharded:
        return DistributedDataParallel(
            model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True,
            broadcast_buffers=False,  # set after training alone, alike on all ranks
        )  # fmt: skip
    shard(system, model, _mesh(device, world_size, shard_size(how, world_size, shard_ranks)))
    return model


def _mesh(device: torch.device, world_size: int, size: int) -> DeviceMesh:
    """The ranks that shard one copy of the weights, ``size`` that follow each other, and its replicas, if any."""
    if size == world_size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size // size, size), mesh_dim_names=("replicate", "shard"))


def shard(system: System, model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards the parts that the system names, and then the rest, over the last axis of ``mesh``, in place."""
    # FSDP2 warns at every call of a part that returns a view; no part changes its inputs or outputs in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for part, reshard in system.sharded_modules(model):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)


def gradients_averaged(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Within the block, a backward pass averages gradients over the replicas only if it is the step's ``last`` one.

    Gradients of sharded weights are averaged over the ranks that share them in every backward pass, after which a rank
    keeps those of its shards alone: whole gradients of the model would take the memory that sharding saves.
    """
    if isinstance(network, DistributedDataParallel) and not last:
        return network.no_sync()
    if isinstance(network, FSDPModule):
        network.set_requires_all_reduce(last)
    return nullcontext()


def full_tensor(t: Tensor) -> Tensor:
    """Gathers a DTensor; a collective, to be called on every rank. Any other tensor is returned as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t
