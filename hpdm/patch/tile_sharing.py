"""Sharing the tiles of a level among the ranks of ``torch.distributed``.

In every round each rank computes one batch of tiles, and then all ranks gather the round's results in tile order. So
every rank adds up the same tiles in the same order: the video does not depend on the number of ranks, bit for bit, and
no rank holds more than the tiles of one round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hpdm.distributed import shard, world_size

Results = tuple[Tensor, ...]
"""What is computed of a batch of n tiles: tensors ``[B, n, ...]``."""


def batches(tiles: range, size: int) -> list[slice]:
    """Splits consecutive tiles into batches of ``size``; the last one may be shorter."""
    return [slice(first, min(first + size, tiles.stop)) for first in range(tiles.start, tiles.stop, size)]


def shared(
    batches: Sequence[slice], compute: Callable[[slice], Results], like: Results
) -> Iterator[tuple[slice, Results]]:
    """Calls ``compute`` on this rank's batches, and yields every rank's ``(batch, results)`` in tile order.

    A collective: every rank makes the same call.

    Args:
        batches: all batches of the level, from :func:`batches`.
        compute: called with one batch at a time, in order.
        like: empty tensors ``[B, 0, ...]`` with the shapes, dtypes and device of the results.
    """
    if world_size() == 1:
        yield from ((batch, compute(batch)) for batch in batches)
        return
    own_batches = shard(batches)
    for turn in range(math.ceil(len(batches) / world_size())):
        results = compute(own_batches[turn]) if turn < len(own_batches) else None
        yield from _gathered(batches[turn * world_size() :][: world_size()], results, like)


def _gathered(batches: Sequence[slice], results: Results | None, like: Results) -> Iterator[tuple[slice, Results]]:
    """The results of one round: ``batches[r]`` is that of rank r; the last ranks may have none."""
    longest = max(batch.stop - batch.start for batch in batches)
    received = [
        _all_gather(None if results is None else results[i], empty, longest) for i, empty in enumerate(like)
    ]  # per result, per rank: [B, longest, ...]
    for rank, batch in enumerate(batches):
        yield batch, tuple(ranks[rank][:, : batch.stop - batch.start] for ranks in received)


def _all_gather(result: Tensor | None, like: Tensor, longest: int) -> list[Tensor]:
    """``[B, n, ...]`` of every rank, padded to ``[B, longest, ...]``: a collective needs equal shapes on all ranks."""
    padded = like.new_zeros(like.shape[0], longest, *like.shape[2:])
    if result is not None:
        padded[:, : result.shape[1]] = result
    received = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(received, padded)
    return received
