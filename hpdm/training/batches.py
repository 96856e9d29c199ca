"""The clips of a training step, in micro-batches that do not depend on the number of ranks.

A step takes ``batch`` clips of the data's order in micro-batches of ``micro``: the first ``batch / world_size`` go to
rank 0, the next to rank 1, and each rank takes its share one micro-batch after another. Row ``j`` of step ``n`` has the
same clip and the same noise whichever rank and micro-batch it is in, so the number of ranks and the size of
micro-batches change a run only by the rounding of sums.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hpdm import distributed
from hpdm.data.clips import ClipItem
from hpdm.data.loader import load
from hpdm.data.mixture import Mixture
from hpdm.data.order import ClipKey, ClipOrder
from hpdm.text import EmbeddingStore, collate_text


class Batch(dict[str, Any]):
    """Clips: ``video`` uint8 ``[B, 3, F, H, W]``, ``labels`` int64 ``[B]``, ``paths``.

    Clips that were encoded ahead have ``latents`` float16 ``[B, z, T, h, w]`` in place of ``video``. With embeddings,
    also ``text`` float32 ``[B, S, W]`` and ``text_mask`` bool ``[B, S]``.
    """

    def inputs(self, conditioning: str, device: torch.device) -> dict[str, Tensor]:
        """The tensors that a model with this kind of conditioning takes, moved to ``device``."""
        told = {"none": (), "class": ("labels",), "text": ("text", "text_mask")}[conditioning]
        shown = "latents" if "latents" in self else "video"
        return {key: self[key].to(device, non_blocking=True) for key in (shown, *told)}


def collate(items: list[ClipItem], embeddings: EmbeddingStore | None = None) -> Batch:
    """Stacks dataset items into a :class:`Batch`, with the embeddings of their captions."""
    batch = Batch(labels=torch.tensor([item["label"] for item in items]), paths=[item["path"] for item in items])
    if "latents" in items[0]:
        batch["latents"] = torch.stack([item["latents"] for item in items])
    else:
        batch["video"] = torch.stack([item["video"] for item in items])
    if embeddings is not None:
        batch["text"], batch["text_mask"] = collate_text([embeddings[item["caption"]] for item in items])
    return batch


class MicroBatches(Sampler[list[ClipKey]]):
    """This rank's micro-batches, without end: those of step ``start``, then those of the next step, and so on.

    Args:
        clips: the clips, or the number of clips in a single set.
        batch: clips of a step, over all ranks.
        micro: clips of a micro-batch, a divisor of ``batch / world_size``.
        seed: of the data's order.
        start: the first step.

    Raises:
        ValueError: ``batch`` is no multiple of ``world_size * micro``.
    """

    def __init__(self, clips: Mixture | int, batch: int, micro: int, seed: int, start: int = 0) -> None:
        self.rank, world_size = distributed.rank(), distributed.world_size()
        if batch % (world_size * micro):
            raise ValueError(
                f"batch: got {batch}, expected a multiple of {world_size} process(es) times the micro-batch, {micro}"
            )
        self.per_step = batch // micro
        self.own = self.per_step // world_size
        self.start = start
        self.order = clips.order(micro, seed) if isinstance(clips, Mixture) else ClipOrder(clips, micro, seed)

    def numbers(self, step: int) -> range:
        """The numbers of this rank's micro-batches of a step, counted over the whole run."""
        first = step * self.per_step + self.rank * self.own
        return range(first, first + self.own)

    def __iter__(self) -> Iterator[list[ClipKey]]:
        step = self.start
        while True:
            for number in self.numbers(step):
                yield self.order.keys(number)
            step += 1


AHEAD_BYTES = 2**30
"""Memory for clips that the workers of a process read ahead, if two micro-batches of each do not need more."""


def prefetch_factor(per_step: int, workers: int, batch_bytes: int) -> int:
    """How many micro-batches each of ``workers`` reads ahead, at least two.

    A step asks for all its micro-batches at once. So what is read while the one before is computed is as many as that,
    if they fit into :data:`AHEAD_BYTES`: with less, a step would wait although the workers can keep up.

    Args:
        per_step: micro-batches of a step on this rank.
        workers: processes, at least 1.
        batch_bytes: of the clips of a micro-batch.
    """
    return max(2, min(-(-per_step // workers), AHEAD_BYTES // (workers * batch_bytes)))


def loader(
    dataset: Dataset[ClipItem], sampler: MicroBatches, workers: int, device: torch.device,
    embeddings: EmbeddingStore | None = None, batch_bytes: int = 1,
) -> Generator[Batch, None, None]:  # fmt: skip
    """Micro-batches in order, decoded by ``workers`` processes (0: by this one), pinned for a GPU.

    ``batch_bytes`` is the size of a micro-batch's clips, see :func:`prefetch_factor`.
    """
    ahead = prefetch_factor(sampler.own, workers, batch_bytes) if workers else None

    def make(keys: Iterable[list[ClipKey]]) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=workers,
            prefetch_factor=ahead,
            collate_fn=partial(collate, embeddings=embeddings),
            pin_memory=device.type == "cuda",
            worker_init_fn=_outlive_interrupts,
        )

    return load(make, sampler)


def _outlive_interrupts(_: int) -> None:
    """Ignores SIGINT in a worker: Ctrl-C reaches all processes, and the training process needs data to end its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def noise_generator(seed: int, number: int) -> torch.Generator:
    """The only source of randomness for step, or micro-batch, ``number``."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
