"""The clips of a training step, cut into micro-batches that do not know how many processes there are.

A step takes ``batch`` clips of the data's order in micro-batches of ``micro``: the first ``batch / processes`` go to
process 0, the next to process 1, and each process takes its own one micro-batch after another. Micro-batch ``j`` of
step ``n`` has the same clips and the same noise whichever process it falls to, so the number of processes changes a run
by the rounding of sums and no more.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from hpdm import distributed
from hpdm.data.clips import ClipItem, ClipKey, ClipSampler, VideoDataset
from hpdm.data.loader import load
from hpdm.text import EmbeddingStore, collate_text


class Batch(dict[str, Any]):
    """Clips: ``video`` uint8 ``[B, 3, F, H, W]``, ``labels`` int64 ``[B]``, ``paths``.

    With embeddings, also ``text`` float32 ``[B, S, W]`` and ``text_mask`` bool ``[B, S]``.
    """


def collate(items: list[ClipItem], embeddings: EmbeddingStore | None = None) -> Batch:
    """Stacks dataset items into a :class:`Batch`, with the embeddings of their captions."""
    batch = Batch(
        video=torch.stack([item["video"] for item in items]),
        labels=torch.tensor([item["label"] for item in items]),
        paths=[item["path"] for item in items],
    )
    if embeddings is not None:
        batch["text"], batch["text_mask"] = collate_text([embeddings[item["caption"]] for item in items])
    return batch


class MicroBatches(Sampler[list[ClipKey]]):
    """This process's micro-batches, endless: all of step ``start``, then all of the next one, and so on.

    Args:
        clips: number of clips in the set.
        batch: clips of a step, over all processes.
        micro: clips of a micro-batch, a divisor of ``batch / processes``.
        seed: of the data's order.
        start: the first step.

    Raises:
        ValueError: ``batch`` cannot be cut so.
    """

    def __init__(self, clips: int, batch: int, micro: int, seed: int, start: int = 0) -> None:
        self.rank, processes = (distributed.rank(), distributed.world_size())
        if batch % (processes * micro):
            raise ValueError(
                f"batch: got {batch}, expected a multiple of {processes} process(es) times the micro-batch, {micro}"
            )
        self.per_step = batch // micro
        self.own = self.per_step // processes
        self.start = start
        self.order = ClipSampler(clips, micro, seed)

    def numbers(self, step: int) -> range:
        """The numbers of this process's micro-batches of a step, counted over the whole run."""
        first = step * self.per_step + self.rank * self.own
        return range(first, first + self.own)

    def __iter__(self) -> Iterator[list[ClipKey]]:
        step = self.start
        while True:
            for number in self.numbers(step):
                yield self.order.keys(number)
            step += 1


def loader(
    dataset: VideoDataset, sampler: MicroBatches, workers: int, device: torch.device,
    embeddings: EmbeddingStore | None = None,
) -> Iterator[Batch]:  # fmt: skip
    """Micro-batches in order, decoded by ``workers`` processes (0: by this one), pinned for a GPU."""

    def make(keys: Iterable[list[ClipKey]]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=partial(collate, embeddings=embeddings),
            pin_memory=device.type == "cuda",
            worker_init_fn=_outlive_interrupts,
        )

    return load(make, sampler)


def _outlive_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training process ends its step first and needs its data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def noise_generator(seed: int, number: int) -> torch.Generator:
    """The one source of randomness of micro-batch ``number``."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
