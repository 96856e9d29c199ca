"""Tensors that may be sharded over ranks (``DTensor``): this rank's parts of them, and the norms of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor: its shard of a ``DTensor``, else the whole tensor. Call it under ``no_grad``."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def whole_norms(local: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Norms of whole tensors from this rank's parts; with sharded tensors a collective, one reduction for all.

    Args:
        local: this rank's parts, at least one.
        like: tensors that are sharded as those are: all whole, or all sharded alike.

    Returns:
        ``[n]``, on the device of the parts.
    """
    return summed_over_shards(torch.stack(torch._foreach_norm(list(local))), like)


def summed_over_shards(norms: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Norms of whole tensors ``[n]`` from the norms ``[n]`` of this rank's parts; arguments as above."""
    return sum_over_shards(norms.square(), like).sqrt() if isinstance(like[0], DTensor) else norms


def sum_over_shards(sums: Tensor, like: Sequence[Tensor]) -> Tensor:
    """Sums over whole tensors ``[..., n]`` from those over this rank's parts, in place; arguments as above."""
    if isinstance(like[0], DTensor):
        for axis, placement in enumerate(like[0].placements):
            if placement.is_shard():
                dist.all_reduce(sums, group=like[0].device_mesh.get_group(axis))
    return sums
