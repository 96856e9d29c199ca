"""A cache of the features of finished levels, on the device or in host memory, from which contexts are built.

Features are the inputs of a block, projected by the context columns of its fusion. On the device they are read in
place. In host memory they are pinned, and the rows that a batch of tiles needs are copied while the batch before it
runs: the device holds the rows of two batches, whatever the number of tiles. Both sample the same rows, so
the results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpdm.patch.context import Context


@dataclass(frozen=True)
class Finished:
    """Features of T tiles of a finished level, of V videos (guidance copies included)."""

    tiles: Tensor
    """``[T]`` numbers of the tiles, ascending."""
    boxes: Tensor
    """``[T, 6]``, the same for every video."""
    features: dict[int, Tensor]
    """Per block ``[V * T, N, D]``, the tile fastest."""

    def rows(self, tiles: Tensor, videos: int) -> Tensor:
        """Rows of the given tiles in ``features``, for every video: ``[n] -> [V * n]``, the tile fastest."""
        return (torch.arange(videos)[:, None] * len(self.tiles) + torch.searchsorted(self.tiles, tiles)).flatten()


def allocate(shape: Sequence[int], like: Tensor, on_host: bool) -> Tensor:
    """Empty memory for a finished level's features: on the device of ``like``, or on the host (pinned for a GPU)."""
    if on_host:
        return torch.empty(*shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
    return like.new_empty(*shape)


class ContextCache:
    """Features of the finished levels, lowest first, and the contexts built from them.

    Args:
        device: where the network runs.
        videos: number of videos V, guidance copies included.
        on_host: keep features in host memory and copy them to the device for each batch of tiles.
    """

    def __init__(self, device: torch.device, videos: int, on_host: bool) -> None:
        self.device, self.videos, self.on_host = device, videos, on_host
        self.finished: list[Finished] = []
        self._copy_stream = torch.cuda.Stream(device) if on_host and device.type == "cuda" else None

    def contexts(
        self, ancestors: Sequence[Tensor], batches: Sequence[Tensor | slice], blocks: Sequence[int],
        videos: int | None = None,
    ) -> Iterator[Context | None]:  # fmt: skip
        """Yields the context of each batch of tiles, fetched one batch ahead; ``None`` where no level is finished.

        Args:
            ancestors: per finished level ``[T]``, the tile there that contains each tile of this level.
            batches: batches of this level's tiles, as slices or as tile numbers.
            blocks: the blocks that fuse context into this level.
            videos: the first so many of the V videos, which are those without the guidance copies; ``None`` for all.
        """
        videos = self.videos if videos is None else videos
        if not self.finished:
            yield from [None] * len(batches)
            return
        fetch = self._copy_rows if self.on_host else self._in_place
        fetched = fetch(ancestors, batches[0], blocks, videos) if batches else None
        for next_batch in [*batches[1:], None]:
            context, ready = fetched or (None, None)
            fetched = None if next_batch is None else fetch(ancestors, next_batch, blocks, videos)
            if ready is not None and context is not None:
                torch.cuda.current_stream(self.device).wait_event(ready)
                self._record_stream(context)
            yield context

    def _in_place(
        self, ancestors: Sequence[Tensor], batch: Tensor | slice, blocks: Sequence[int], videos: int
    ) -> tuple[Context, torch.cuda.Event | None]:
        """Context whose sources are the whole cache, which is on the device already."""
        index = [f.rows(ancestor[batch], videos) for f, ancestor in zip(self.finished, ancestors)]
        features = {b: tuple(f.features[b] for f in self.finished) for b in blocks}
        boxes = tuple(f.boxes.repeat(self.videos, 1).to(self.device) for f in self.finished)
        return Context(features, None, boxes, torch.stack(index, dim=1).to(self.device)), None

    def _copy_rows(
        self, ancestors: Sequence[Tensor], batch: Tensor | slice, blocks: Sequence[int], videos: int
    ) -> tuple[Context, torch.cuda.Event | None]:
        """Context with copies of the rows that the batch needs, each row once, and an event that ends the copy."""
        features: dict[int, list[Tensor]] = {b: [] for b in blocks}
        boxes, index = [], []
        for f, ancestor in zip(self.finished, ancestors):
            tiles, inverse = torch.unique(ancestor[batch], return_inverse=True)
            rows = f.rows(tiles, videos)
            for b in blocks:
                features[b].append(self._copy(f.features[b], rows))
            boxes.append(self._move(f.boxes[tiles].repeat(videos, 1)))
            index.append((torch.arange(videos)[:, None] * len(tiles) + inverse).flatten())
        moved = self._move(torch.stack(index, dim=1))
        context = Context({b: tuple(parts) for b, parts in features.items()}, None, tuple(boxes), moved)
        return context, None if self._copy_stream is None else self._copy_stream.record_event()

    def _copy(self, source: Tensor, rows: Tensor) -> Tensor:
        """Rows of a tensor in host memory, ``[T, N, D] -> [n, N, D]`` on the device."""
        if self._copy_stream is None:
            return source.index_select(0, rows)
        # Only copies from pinned memory overlap with kernels. PyTorch's allocator reuses a pinned block only after the
        # copy from it has ended.
        staged = torch.empty(len(rows), *source.shape[1:], dtype=source.dtype, pin_memory=True)
        return self._move(torch.index_select(source, 0, rows, out=staged))

    def _move(self, host: Tensor) -> Tensor:
        """A tensor in host memory, on the device; on a GPU the copy is asynchronous, on the copy stream."""
        if self._copy_stream is None:
            return host.to(self.device)
        with torch.cuda.stream(self._copy_stream):
            return (host if host.is_pinned() else host.pin_memory()).to(self.device, non_blocking=True)

    def _record_stream(self, context: Context) -> None:
        """Tells the allocator that the current stream uses memory that was allocated on the copy stream."""
        stream = torch.cuda.current_stream(self.device)
        tensors = [t for parts in context.features.values() for t in parts]
        for tensor in [*tensors, *context.boxes, context.index]:
            tensor.record_stream(stream)
