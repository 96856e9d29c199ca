"""The finished levels of one call of the sampler, and the context that they give to tiles of the levels above.

A finished level is clean, so the features of its tiles do not change while the levels above are sampled (section 4.5,
"Cached inference"). The context of a batch of tiles comes from one of three functions with the same signature,
:func:`cached`, :func:`recomputed` or :func:`shallow`, chosen by :func:`choose_contexts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hpdm.patch import tile_sharing
from hpdm.patch.config import HPDMConfig
from hpdm.patch.context import Context
from hpdm.patch.context_cache import ContextCache, Finished, allocate
from hpdm.patch.tile_network import TileNetwork, tiles_per_call
from hpdm.patch.tiling import Tiling, find_ancestors, lineage
from hpdm.sampling import SamplerOptions
from hpdm_kernels import extract_tiles


class FinishedLevels:
    """The videos of the finished levels, and the cached features of their tiles.

    Args:
        network: the network for the videos of this call.
        tilings: the tiling of every level.
        videos: videos of the levels that are finished already, ``[B, C, F_l, H_l, W_l]`` each.

    Raises:
        ValueError: videos that do not have the sizes of the first levels.
    """

    def __init__(self, network: TileNetwork, tilings: Sequence[Tiling], videos: Sequence[Tensor]) -> None:
        self.network, self.tilings = network, tilings
        self.ancestors = find_ancestors(tilings)
        count, channels = network.conditions.videos, network.config.channels
        expected = [(count, channels, *tiling.size) for tiling in tilings]
        got = [tuple(video.shape) for video in videos]
        if len(got) > len(expected) or any(a != b for a, b in zip(got, expected)):
            raise ValueError(f"finished: got videos of {got}, expected the first of {expected}")
        self.videos = [video.to(network.device) for video in videos]
        self.cache = ContextCache(network.device, network.conditions.rows, network.options.cache == "cpu")

    @property
    def tiles_per_call(self) -> int:
        """Tiles of each video in one network call."""
        return tiles_per_call(self.network.options, self.network.conditions.videos)

    def batches(self, level: int) -> list[slice]:
        """The batches of a level's tiles that go through the network."""
        return tile_sharing.batches(self.tilings[level].tiles, self.tiles_per_call)

    def clean_tiles(self, level: int, tiles: Tensor | slice) -> Tensor:
        """Scaled tiles of a finished level, ``[B, n, C, f, h, w]``."""
        model, origins = self.network.model, self.tilings[level].origins[tiles]
        clean = extract_tiles(self.videos[level], origins, model.config.patch, backend=model.kernels)
        return clean * model.config.signal_scale(level)

    def features(self, level: int, tiles: Tensor | slice, context: Context | None) -> dict[int, Tensor]:
        """Features of tiles of a finished level, per block ``[V, n, N, D]``."""
        boxes = self.tilings[level].boxes[tiles]
        return self.network.features(level, self.clean_tiles(level, tiles), boxes, context)

    def keep_features(self, level: int, called: Callable[[], None] = lambda: None) -> None:
        """Computes the features of all tiles of a finished level and caches them. A collective: ranks share the tiles.

        Args:
            level: the lowest finished level whose features are not in the cache.
            called: called after every network call.
        """
        model, rows, tiling = self.network.model, self.network.conditions.rows, self.tilings[level]
        blocks, shape = model.fusing_blocks(level + 1), (model.config.tokens, model.config.width)
        kept = {b: allocate((rows, tiling.tiles, *shape), model.latents, self.cache.on_host) for b in blocks}
        batches = self.batches(level)
        contexts = cached(self, level, tile_sharing.shard(batches))

        def compute(batch: slice) -> tile_sharing.Results:
            features = self.features(level, batch, next(contexts))
            called()
            return tuple(features[b] for b in blocks)

        like = (model.latents.new_empty(rows, 0, *shape),) * len(blocks)
        for batch, results in tile_sharing.shared(batches, compute, like):
            for block, features in zip(blocks, results):
                kept[block][:, batch] = features
        flat = {block: features.flatten(0, 1) for block, features in kept.items()}
        self.cache.finished.append(Finished(torch.arange(tiling.tiles), tiling.boxes, flat))


Contexts = Callable[[FinishedLevels, int, Sequence[slice]], Iterator[Context | None]]
"""``contexts(levels, level, batches)`` yields the context of each batch of tiles of ``level``; ``None`` on level 0."""


def keeps_features(config: HPDMConfig, options: SamplerOptions) -> bool:
    """Whether the features of finished levels are computed once and kept."""
    return config.fusion == "deep" and options.cache != "off"


def choose_contexts(config: HPDMConfig, options: SamplerOptions) -> Contexts:
    """The function that gives the context for these options."""
    if config.fusion == "shallow":
        return shallow
    return cached if options.cache != "off" else recomputed


def cached(levels: FinishedLevels, level: int, batches: Sequence[slice]) -> Iterator[Context | None]:
    """Context from the features that :meth:`FinishedLevels.keep_features` cached."""
    blocks = levels.network.model.fusing_blocks(level)
    return levels.cache.contexts(levels.ancestors[level], batches, blocks)


def recomputed(levels: FinishedLevels, level: int, batches: Sequence[slice]) -> Iterator[Context | None]:
    """Context without a cache: for each batch, the tiles that it depends on go through the network, from level 0 up."""
    network, ancestors, size = levels.network, levels.ancestors, levels.tiles_per_call
    for batch in batches:
        cache = ContextCache(network.device, network.conditions.rows, on_host=False)
        for below, needed in enumerate(lineage(ancestors, level, batch)):
            parts = needed.split(size)
            contexts = cache.contexts(ancestors[below], parts, network.model.fusing_blocks(below))
            features = [levels.features(below, part, context) for part, context in zip(parts, contexts)]
            kept = {b: torch.cat([f[b] for f in features], dim=1).flatten(0, 1) for b in features[0]}  # [V * T, N, D]
            cache.finished.append(Finished(needed, levels.tilings[below].boxes[needed], kept))
        yield next(cache.contexts(ancestors[level], [batch], network.model.fusing_blocks(level)))


def shallow(levels: FinishedLevels, level: int, batches: Sequence[slice]) -> Iterator[Context | None]:
    """Context of shallow fusion: the pixels of the previous level's tile that contains each tile."""
    network = levels.network
    for batch in batches:
        if level == 0:
            yield None
            continue
        tiles = levels.ancestors[level][-1][batch]  # [n]
        n = len(tiles)
        pixels = network.scale_input(level - 1, levels.clean_tiles(level - 1, tiles), 0.0)  # [B, n, C, f, h, w]
        boxes = network.rows(levels.tilings[level - 1].boxes[tiles].to(network.device)[None, None], n)  # [V * n, 6]
        index = torch.arange(len(boxes), device=network.device)[:, None]
        yield Context({}, network.rows(pixels[None], n), (boxes,), index)
