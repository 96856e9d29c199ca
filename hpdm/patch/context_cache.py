"""What the tiles of a level sample from the finished levels below it, kept on the device or in host memory.

A finished level is clean, so its tiles' features (block inputs through the context columns of the block's fusion) are
computed once. On the device they are read in place. In host memory they are pinned, and a batch of tiles has the rows
that it needs copied ahead of it, while the batch before it runs: the device holds two batches' rows, whatever the
number of tiles. Both give the same bits, because the same rows are sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdm.patch.boxes import Tiling
from hpdm.patch.model import Context


def find_ancestors(tilings: Sequence[Tiling]) -> list[list[Tensor]]:
    """Per level, for every level below it, the tile there that contains each tile, ``[T]``."""
    return [[below.containing(cover.boxes) for below in tilings[:n]] for n, cover in enumerate(tilings)]


def lineage(ancestors: Sequence[Sequence[Tensor]], level: int, batch: slice) -> list[Tensor]:
    """Per level below, the tiles that a batch of tiles needs: its ancestors and theirs, each once, ascending.

    Args:
        ancestors: of :func:`find_ancestors`.
        level: of the tiles.
        batch: some of them.
    """
    needed = [tiles[batch] for tiles in ancestors[level]]
    for k in reversed(range(level)):
        needed[k] = needed[k].unique()
        for j in range(k):
            needed[j] = torch.cat((needed[j], ancestors[k][j][needed[k]]))
    return needed


@dataclass(frozen=True)
class Finished:
    """``T`` tiles of a finished level of ``V`` videos (with their guidance copies) as their features."""

    tiles: Tensor
    """``[T]``, their numbers, ascending."""
    boxes: Tensor
    """``[T, 6]``, of every video."""
    features: dict[int, Tensor]
    """Per block ``[V * T, N, D]``."""

    def rows(self, tiles: Tensor, videos: int) -> Tensor:
        """Rows of some of the tiles, the same of every video, videos slowest: ``[T'] -> [V * T']``."""
        return (torch.arange(videos)[:, None] * len(self.tiles) + torch.searchsorted(self.tiles, tiles)).flatten()


def allocate(shape: Sequence[int], like: Tensor, on_host: bool) -> Tensor:
    """Where a finished level's features go: on the device of ``like``, or in host memory, pinned if that is a GPU."""
    if on_host:
        return torch.empty(*shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
    return like.new_empty(*shape)


class ContextCache:
    """The finished levels of one run.

    Args:
        device: where the network runs.
        videos: V.
        on_host: features lie in host memory and are fetched for each batch of tiles.
    """

    def __init__(self, device: torch.device, videos: int, on_host: bool) -> None:
        self.device, self.videos, self.on_host = device, videos, on_host
        self.finished: list[Finished] = []
        self._side = torch.cuda.Stream(device) if on_host and device.type == "cuda" else None

    def contexts(
        self, ancestors: Sequence[Tensor], batches: Sequence[Tensor | slice], blocks: Sequence[int]
    ) -> Iterator[Context | None]:
        """The context of each batch of tiles in turn, fetched one batch ahead.

        Args:
            ancestors: per finished level ``[T]``, the tile there that contains each tile of this level.
            batches: of the tiles of this level, slices or numbers.
            blocks: those that fuse context into this level.
        """
        if not self.finished:
            yield from [None] * len(batches)
            return
        fetch = self._fetch if self.on_host else self._look
        ahead = fetch(ancestors, batches[0], blocks) if batches else None
        for following in [*batches[1:], None]:
            context, ready = ahead or (None, None)
            ahead = None if following is None else fetch(ancestors, following, blocks)
            if ready is not None and context is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
                self._keep(context)
            yield context

    def _look(
        self, ancestors: Sequence[Tensor], batch: Tensor | slice, blocks: Sequence[int]
    ) -> tuple[Context, torch.cuda.Event | None]:
        """Everything is on the device already; an index says which rows."""
        index = [f.rows(ancestor[batch], self.videos) for f, ancestor in zip(self.finished, ancestors)]
        features = {b: tuple(f.features[b] for f in self.finished) for b in blocks}
        boxes = tuple(f.boxes.repeat(self.videos, 1).to(self.device) for f in self.finished)
        return Context(features, None, boxes, torch.stack(index, dim=1).to(self.device)), None

    def _fetch(
        self, ancestors: Sequence[Tensor], batch: Tensor | slice, blocks: Sequence[int]
    ) -> tuple[Context, torch.cuda.Event | None]:
        """Copies the rows that the batch needs, each once."""
        features: dict[int, list[Tensor]] = {b: [] for b in blocks}
        boxes, index = [], []
        for f, ancestor in zip(self.finished, ancestors):
            tiles, inverse = torch.unique(ancestor[batch], return_inverse=True)
            rows = f.rows(tiles, self.videos)
            for b in blocks:
                features[b].append(self._copy(f.features[b], rows))
            boxes.append(self._move(f.boxes[tiles].repeat(self.videos, 1)))
            index.append((torch.arange(self.videos)[:, None] * len(tiles) + inverse).flatten())
        moved = self._move(torch.stack(index, dim=1))
        context = Context({b: tuple(parts) for b, parts in features.items()}, None, tuple(boxes), moved)
        return context, None if self._side is None else self._side.record_event()

    def _copy(self, source: Tensor, rows: Tensor) -> Tensor:
        if self._side is None:
            return source.index_select(0, rows)
        # Gathered into pinned memory, from which alone a copy runs beside the kernels. PyTorch's pinned allocator
        # reuses the block only after the copy that reads it has ended.
        staged = torch.empty(len(rows), *source.shape[1:], dtype=source.dtype, pin_memory=True)
        return self._move(torch.index_select(source, 0, rows, out=staged))

    def _move(self, host: Tensor) -> Tensor:
        if self._side is None:
            return host.to(self.device)
        with torch.cuda.stream(self._side):
            return (host if host.is_pinned() else host.pin_memory()).to(self.device, non_blocking=True)

    def _keep(self, context: Context) -> None:
        """Tells the allocator that memory of the side stream is in use on this one."""
        stream = torch.cuda.current_stream(self.device)
        tensors = [t for parts in context.features.values() for t in parts]
        for tensor in [*tensors, *context.boxes, context.index]:
            tensor.record_stream(stream)
