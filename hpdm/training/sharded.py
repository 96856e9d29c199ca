"""Tensors that may be sharded over ranks (``DTensor``): this rank's parts of them, and the norms of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 2**26
"""About how much of a model an optimizer works on at once: few launches, and little memory for what it computes."""


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """``tensors`` in their order, as many at once as have :data:`BUCKET_BYTES` on this rank, and at least one."""
    bucket: list[Tensor] = []
    size = 0
    for t in tensors:
        nbytes = (t.to_local() if isinstance(t, DTensor) else t).nbytes
        if bucket and size + nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(t)
        size += nbytes
    if bucket:
        yield bucket


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
    """Norms of whole tensors ``[n]`` from the norms ``[n]`` of this rank's parts, in place; arguments as above."""
    if isinstance(like[0], DTensor):
        norms.square_()
        for axis, placement in enumerate(like[0].placements):
            if placement.is_shard():
                dist.all_reduce(norms, group=like[0].device_mesh.get_group(axis))
        norms.sqrt_()
    return norms
