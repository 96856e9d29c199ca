"""Sharing the tiles of a level out over the processes of ``torch.distributed``.

In every round each process takes the next batch of tiles, and all exchange what they made of them, in the order of the
tiles. So each adds up the same tiles in the same order: the video does not depend on the number of processes, bit for
bit, and none ever holds more than a round's tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from hpdm.distributed import world_size


def batches(tiles: int, size: int) -> list[slice]:
    """``tiles`` in batches of ``size``, the last one shorter."""
    return [slice(first, min(first + size, tiles)) for first in range(0, tiles, size)]


def rounds(all_batches: list[slice]) -> int:
    """How many times the processes exchange results."""
    return math.ceil(len(all_batches) / world_size())


def exchange(all_batches: list[slice], turn: int, mine: Tensor | None, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """What every process made in round ``turn``: ``(batch, [B, n, ...])`` in the order of the tiles.

    Args:
        all_batches: of all processes.
        turn: number of the round.
        mine: this process's result, ``None`` if it had no batch left.
        like: an empty tensor ``[B, 0, ...]`` of the results' shape, dtype and device.
    """
    count = world_size()
    taken = all_batches[turn * count : (turn + 1) * count]
    if count == 1:
        if mine is not None:
            yield taken[0], mine
        return
    longest = max(b.stop - b.start for b in taken)
    shape = (like.shape[0], longest, *like.shape[2:])
    # Processes without a batch and shorter batches are filled up: a collective wants equal shapes of all.
    sent = like.new_zeros(shape)
    if mine is not None:
        sent[:, : mine.shape[1]] = mine
    received = [torch.empty_like(sent) for _ in range(count)]
    dist.all_gather(received, sent)
    for batch, got in zip(taken, received):
        yield batch, got[:, : batch.stop - batch.start]
