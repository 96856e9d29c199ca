"""The finished levels of one call of the sampler, and the context that they give to tiles of the levels above.

A finished level does not change, so neither do the features of its tiles while the levels above are sampled (section
4.5, "Cached inference"). The context of a batch of tiles comes from one of three functions with the same signature,
:func:`cached`, :func:`recomputed` or :func:`shallow`, chosen by :func:`choose_contexts`.

Context is clean, or with ``SamplerOptions.context_noise`` noised to a small time: the conditioning augmentation of
cascaded diffusion (Ho et al. 2022), against errors that one level hands on to the next. The noise is drawn once for a
level's whole video, so that tiles that overlap, cached and recomputed features, all ranks and a resumed call see the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hpdm.noise import level_noise
from hpdm.patch import tile_sharing
from hpdm.patch.config import HPDMConfig
from hpdm.patch.context import Context
from hpdm.patch.context_cache import ContextCache, Finished, allocate
from hpdm.patch.section import Section, needed_features
from hpdm.patch.tile_network import TileNetwork, feature_copies, tiles_per_call
from hpdm.patch.tiling import Tiling, find_ancestors, lineage
from hpdm.process import gamma
from hpdm.sampling import SamplerOptions
from hpdm_kernels import extract_tiles


class FinishedLevels:
    """The videos of the finished levels, and the cached features of their tiles.

    Args:
        network: the network for the videos of this call.
        tilings: the tiling of every level.
        videos: videos of the levels that are finished already, ``[B, C, F_l, H_l, W_l]`` each.
        seeds: B seeds, for the noise of the context.
        window: number of the window of the video, for its random stream.
        sections: what is sampled of each level, ``None`` for nothing: features are computed of the tiles that these
            need; ``None`` for all.

    Raises:
        ValueError: videos that do not have the sizes of the first levels.
    """

    def __init__(
        self, network: TileNetwork, tilings: Sequence[Tiling], videos: Sequence[Tensor], seeds: Sequence[int],
        window: int = 0, sections: Sequence[Section | None] | None = None,
    ) -> None:  # fmt: skip
        self.network, self.tilings, self.seeds, self.window = network, tilings, seeds, window
        self.copies = feature_copies(network.options)
        """Guidance copies of the features."""
        self.ancestors = find_ancestors(tilings)
        self.needed = [torch.arange(tiling.tiles) for tiling in tilings]
        """The tiles of each level whose features are computed, ascending."""
        if sections is not None:
            self.needed = needed_features(self.ancestors, sections)
        count, channels = network.conditions.videos, network.config.channels
        expected = [(count, channels, *tiling.size) for tiling in tilings]
        got = [tuple(video.shape) for video in videos]
        if len(got) > len(expected) or any(a != b for a, b in zip(got, expected)):
            raise ValueError(f"finished: got videos of {got}, expected the first of {expected}")
        self.videos: list[Tensor] = []
        self._noised: list[Tensor] = []  # with context noise, x~ of the levels that are context
        for video in videos:
            self.add(video.to(network.device))
        self.cache = ContextCache(network.device, self.copies * count, network.options.cache == "cpu")

    def add(self, video: Tensor) -> None:
        """Takes the next finished level, ``[B, C, F_l, H_l, W_l]`` in [-1, 1]."""
        level, time = len(self.videos), self.network.options.context_noise
        self.videos.append(video)
        if time > 0 and level < len(self.tilings) - 1:
            g = float(gamma(torch.tensor(time, dtype=torch.float64)))
            noise = level_noise(self.seeds, level, tuple(video.shape[1:]), "context", self.window).to(video)
            y = video * self.network.config.signal_scale(level)
            self._noised.append(y.mul_(g**0.5).add_(noise, alpha=(1 - g) ** 0.5))

    def batches(self, tiles: range, copies: int) -> list[slice]:
        """The batches of consecutive tiles that go through the network with ``copies`` rows per tile."""
        size = tiles_per_call(self.network.options, self.network.conditions.videos, copies)
        return tile_sharing.batches(tiles, size)

    def feature_batches(self, level: int) -> list[slice]:
        """The batches in which the features of a level's needed tiles are computed, as parts of ``needed``."""
        return self.batches(range(len(self.needed[level])), self.copies)

    def context_tiles(self, level: int, tiles: Tensor | slice) -> Tensor:
        """Tiles of a finished level at the time of the context, scaled by the signal scale, ``[B, n, C, f, h, w]``."""
        model, origins = self.network.model, self.tilings[level].origins[tiles]
        video = self._noised[level] if self._noised else self.videos[level]
        extracted = extract_tiles(video, origins, model.config.patch, backend=model.kernels)
        return extracted if self._noised else extracted * model.config.signal_scale(level)

    def features(self, level: int, tiles: Tensor | slice, context: Context | None, copies: int) -> dict[int, Tensor]:
        """Features of tiles of a finished level, per block ``[V, n, N, D]`` with ``V = copies * B``."""
        boxes = self.tilings[level].boxes[tiles]
        return self.network.features(level, self.context_tiles(level, tiles), boxes, context, copies)

    def keep_features(self, level: int, called: Callable[[], None] = lambda: None) -> None:
        """Computes the features of a finished level's needed tiles and caches them. A collective: ranks share them.

        Args:
            level: the lowest finished level whose features are not in the cache.
            called: called after every network call.
        """
        model, tiling, needed = self.network.model, self.tilings[level], self.needed[level]
        rows = self.copies * self.network.conditions.videos
        blocks, shape = model.fusing_blocks(level + 1), (model.config.tokens, model.config.width)
        kept = {b: allocate((rows, len(needed), *shape), model.latents, self.cache.on_host) for b in blocks}
        batches = self.feature_batches(level)
        contexts = cached(self, level, [needed[batch] for batch in tile_sharing.shard(batches)], self.copies)

        def compute(batch: slice) -> tile_sharing.Results:
            features = self.features(level, needed[batch], next(contexts), self.copies)
            called()
            return tuple(features[b] for b in blocks)

        like = (model.latents.new_empty(rows, 0, *shape),) * len(blocks)
        for batch, results in tile_sharing.shared(batches, compute, like):
            for block, features in zip(blocks, results):
                kept[block][:, batch] = features
        flat = {block: features.flatten(0, 1) for block, features in kept.items()}
        self.cache.finished.append(Finished(needed, tiling.boxes[needed], flat))


Contexts = Callable[[FinishedLevels, int, Sequence[slice], int], Iterator[Context | None]]
"""``contexts(levels, level, batches, copies)`` yields the context of each batch of tiles of ``level``, for ``copies``
rows per tile; ``None`` on level 0."""


def keeps_features(config: HPDMConfig, options: SamplerOptions) -> bool:
    """Whether the features of finished levels are computed once and kept."""
    return config.fusion == "deep" and options.cache != "off"


def choose_contexts(config: HPDMConfig, options: SamplerOptions) -> Contexts:
    """The function that gives the context for these options."""
    if config.fusion == "shallow":
        return shallow
    return cached if options.cache != "off" else recomputed


def cached(
    levels: FinishedLevels, level: int, batches: Sequence[slice] | Sequence[Tensor], copies: int
) -> Iterator[Context | None]:
    """Context from the features that :meth:`FinishedLevels.keep_features` cached."""
    blocks = levels.network.model.fusing_blocks(level)
    videos = copies * levels.network.conditions.videos
    return levels.cache.contexts(levels.ancestors[level], batches, blocks, videos)


def recomputed(levels: FinishedLevels, level: int, batches: Sequence[slice], copies: int) -> Iterator[Context | None]:
    """Context without a cache: for each batch, the tiles that it depends on go through the network, from level 0 up."""
    network, ancestors, videos = levels.network, levels.ancestors, levels.network.conditions.videos
    size = tiles_per_call(network.options, videos, copies)
    for batch in batches:
        cache = ContextCache(network.device, copies * videos, on_host=False)
        for below, needed in enumerate(lineage(ancestors, level, batch)):
            parts = needed.split(size)
            contexts = cache.contexts(ancestors[below], parts, network.model.fusing_blocks(below))
            features = [levels.features(below, part, context, copies) for part, context in zip(parts, contexts)]
            kept = {b: torch.cat([f[b] for f in features], dim=1).flatten(0, 1) for b in features[0]}  # [V * T, N, D]
            cache.finished.append(Finished(needed, levels.tilings[below].boxes[needed], kept))
        yield next(cache.contexts(ancestors[level], [batch], network.model.fusing_blocks(level)))


def shallow(levels: FinishedLevels, level: int, batches: Sequence[slice], copies: int) -> Iterator[Context | None]:
    """Context of shallow fusion: the pixels of the previous level's tile that contains each tile."""
    network = levels.network
    for batch in batches:
        if level == 0:
            yield None
            continue
        tiles = levels.ancestors[level][-1][batch]  # [n]
        n = len(tiles)
        time = network.options.context_noise
        pixels = network.scale_input(level - 1, levels.context_tiles(level - 1, tiles), time)  # [B, n, C, f, h, w]
        boxes = levels.tilings[level - 1].boxes[tiles].to(network.device)
        boxes = network.rows(boxes[None, None], n, copies)  # [V * n, 6]
        index = torch.arange(len(boxes), device=network.device)[:, None]
        yield Context({}, network.rows(pixels[None], n, copies), (boxes,), index)
