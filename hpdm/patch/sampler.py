"""Hierarchical tiled sampling (paper section 4.4): level by level, each level tile by tile.

Level 0 is one patch. A later level is covered by tiles; at every step the tiles' denoised predictions are averaged
where they overlap (MultiDiffusion) and the whole video takes one step (``solvers``). A finished level is clean, so the
block inputs of its tiles are computed and projected once and serve as context for all tiles and steps above, which
interpolate them and no more (section 4.5, "Cached inference"; ``context_cache``). Tiles are shared out over processes
(``tile_sharing``).

Latents of a model with self-conditioning are carried from step to step on level 0 alone, which is one tile: kept for
every tile they would grow with the tiles. Later levels and clean passes start without, as some samples of training do.

What a process holds grows with the videos and with one batch of tiles, never with the number of tiles, but for the
features of the finished levels, which lie where ``cache`` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpdm import distributed
from hpdm.patch import tile_sharing
from hpdm.patch.boxes import Tiling, parse_overlap, tiling
from hpdm.patch.config import HPDMConfig, check_choice
from hpdm.patch.context_cache import ContextCache, Finished, allocate, find_ancestors, lineage
from hpdm.patch.model import HPDM, Context
from hpdm.process import denoise, network_input, time_of_sigma
from hpdm.solvers import Solver
from hpdm_kernels import TileAccumulator, extract_tiles

Progress = Callable[[int, int, int], None]
"""Called as (level, network calls done, network calls in all) after every call on that level."""

SolverName = Literal["edm", "heun", "ddim"]
"""``"edm"``: second order with churn. ``"heun"``: second order. ``"ddim"``: first order. The last two deterministic."""

CacheMode = Literal["gpu", "cpu", "off"]
"""Where features of finished levels lie: on the model's device, in host memory, or nowhere: computed for each batch."""


@dataclass(frozen=True)
class SamplerOptions:
    """How to sample.

    Raises:
        ValueError: a value out of range; the message names the field.
    """

    steps: int = 128
    """Steps on level 0."""
    steps_decay: float = 0.5
    """Factor on the steps with every level (appendix C: halved)."""
    solver: SolverName = "edm"
    """On level 0."""
    later_solver: SolverName = "ddim"
    """On later levels. A second-order correction there made grain (appendix D.3)."""
    overlap: str = "fhw"
    """Axes on which tiles overlap: "none" or some of the letters f, h, w (Table 4)."""
    tiles_per_patch: int = 2
    """Tiles that start within one patch on an overlapping axis: 2 is 50 % overlap, 4 is 75 %."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none, 0 is unconditional."""
    churn: float = 10.0
    """Stochasticity of the solver "edm", EDM's S_churn."""
    churn_range: tuple[float, float] = (0.05, 50.0)
    """Noise levels sigma between which churn acts, EDM's S_tmin and S_tmax."""
    clip: bool = True
    """Clamp predictions to the range of pixels."""
    tile_batch: int = 64
    """Patches per network call, guidance counted twice."""
    cache: CacheMode = "gpu"
    """Features of finished levels: on the device ("gpu"), in host memory ("cpu"), or computed for each batch of tiles
    ("off")."""

    def __post_init__(self) -> None:
        parse_overlap(self.overlap)
        check_choice("solver", self.solver, SolverName)
        check_choice("later_solver", self.later_solver, SolverName)
        check_choice("cache", self.cache, CacheMode)
        for name, least in (("steps", 1), ("tiles_per_patch", 2), ("churn", 0), ("tile_batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if not 0 < self.steps_decay <= 1:
            raise ValueError(f"steps_decay: got {self.steps_decay}, expected a factor in (0, 1]")

    def level_steps(self, level: int) -> int:
        """Steps on a level, at least one."""
        return max(1, round(self.steps * self.steps_decay**level))

    def level_solver(self, level: int) -> Solver:
        """How a level is sampled."""
        name = self.later_solver if level else self.solver
        churn = self.churn if name == "edm" else 0.0
        return Solver(self.level_steps(level), name != "ddim", churn, self.churn_range)

    def tiling(self, config: HPDMConfig, level: int) -> Tiling:
        """The cover of a level."""
        return tiling(config, level, parse_overlap(self.overlap), self.tiles_per_patch)


class Sampler:
    """Samples whole videos from a model.

    Under ``torch.distributed`` every process makes the same call and gets the same videos.

    Args:
        model: in eval mode, on the device to sample on.
        options: see :class:`SamplerOptions`.
    """

    def __init__(self, model: HPDM, options: SamplerOptions | None = None) -> None:
        self.model = model
        self.options = options or SamplerOptions()
        self.config = model.config
        self.tilings = [self.options.tiling(model.config, n) for n in range(self.config.levels)]

    @torch.no_grad()
    def __call__(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        progress: Progress | None = None,
        finished: Sequence[Tensor] = (),
        on_level: Callable[[int, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """Samples one video per seed.

        Args:
            seeds: B seeds. A video depends on its own seed and conditioning alone (up to rounding), not on the batch.
            labels: ``[B]`` int64 classes, for class conditioning; ``None`` for no class.
            text: ``[B, S, text_width]`` embeddings, for text conditioning; ``None`` for no text.
            text_mask: ``[B, S]`` bool, true where there is text.
            progress: called after every network call.
            finished: videos of the first levels that an earlier, interrupted call of the same seeds and conditioning
                has made; sampling goes on behind them.
            on_level: called as (level, videos) after every level, to keep them.

        Returns:
            The videos of every level, ``[B, C, F_l, H_l, W_l]`` float32 in [-1, 1]; the last one is the result.

        Raises:
            ValueError: no seeds, labels out of range, not one text per seed, guidance without conditioning, or finished
                levels that do not match.
        """
        run = _Run(self, seeds, labels, text, text_mask, progress, finished)
        for level in range(len(finished), self.config.levels):
            run.sample(level)
            if on_level is not None:
                on_level(level, run.videos[level])
        return run.videos


class _Run:
    """One call of the sampler: its conditioning, its finished levels, and the network calls over tiles."""

    def __init__(
        self,
        sampler: Sampler,
        seeds: Sequence[int],
        labels: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        progress: Progress | None,
        finished: Sequence[Tensor],
    ) -> None:
        self.model, self.config, self.options = sampler.model, sampler.config, sampler.options
        self.tilings, self.seeds, self.progress = sampler.tilings, seeds, progress
        self.device = self.model.latents.device
        guided = self.options.guidance != 1.0
        self.copies = 2 if guided else 1
        self.chunk = max(1, self.options.tile_batch // max(1, len(seeds) * self.copies))
        self._set_conditioning(labels, text, text_mask, guided)
        self._check_finished(finished)
        self.ancestors = find_ancestors(self.tilings)
        self.cache = ContextCache(self.device, self.copies * len(seeds), self.options.cache == "cpu")
        self.videos = [v.to(self.device) for v in finished]
        self.done = self.calls = 0
        self.latents: Tensor | None = None
        for level in range(min(len(finished), self.config.levels - 1) if self._caches else 0):
            self._keep_features(level)

    def _set_conditioning(
        self, labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None, guided: bool
    ) -> None:
        batch = len(self.seeds)
        if batch == 0:
            raise ValueError("seeds: got none, expected at least one")
        if guided and labels is None and text is None:
            raise ValueError(f"guidance: got {self.options.guidance} without labels or text, expected 1")
        if labels is not None:
            if tuple(labels.shape) != (batch,) or labels.min() < 0 or labels.max() > self.config.classes:
                raise ValueError(f"labels: got {labels.tolist()}, expected {batch} in 0..{self.config.classes - 1}")
            labels = labels.to(self.device)
            if guided:
                labels = torch.cat((labels, torch.full_like(labels, self.config.classes)))
        if text is not None:
            if text.shape[:1] != (batch,):
                raise ValueError(f"text: got shape {tuple(text.shape)}, expected {batch} texts, one for each seed")
            text = text.to(self.device)
            mask = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
            text_mask = mask.to(self.device)
            if guided:
                text, text_mask = text.repeat(2, 1, 1), torch.cat((text_mask, torch.zeros_like(text_mask)))
        self.labels, self.text, self.text_mask = labels, text, text_mask

    def _check_finished(self, finished: Sequence[Tensor]) -> None:
        shapes = [(len(self.seeds), self.config.channels, *t.size) for t in self.tilings]
        got = [tuple(v.shape) for v in finished]
        if len(got) > len(shapes) or any(a != b for a, b in zip(got, shapes)):
            raise ValueError(f"finished: got videos of {got}, expected the first of {shapes}")

    def sample(self, level: int) -> None:
        """Samples a level above the finished ones, and keeps what the levels above need of it."""
        self.latents = None
        cover, solver = self.tilings[level], self.options.level_solver(level)
        shape = (self.config.channels, *cover.size)
        generators = [_generator(seed, level) for seed in self.seeds]

        def noise() -> Tensor:
            # Drawn on the CPU, so that every device sees the same.
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        all_batches = tile_sharing.batches(cover.tiles, self.chunk)
        keeps = level + 1 < self.config.levels and self._caches
        self.done, self.calls = 0, (solver.predictions + keeps) * len(distributed.shard(all_batches))
        sums = TileAccumulator(cover.origins, self.config.patch, cover.size, backend=self.model.kernels)

        def update(x: Tensor, sigma: float, base: Tensor, alpha: float, beta: float) -> Tensor:
            self._predict(level, x, sigma, all_batches, sums)
            return sums.step(base, alpha, beta)

        y = solver.solve(solver.start(noise()), update, noise)
        self.videos.append((y / self.config.signal_scale(level)).clamp_(-1, 1))
        if keeps:
            self._keep_features(level)

    def _predict(self, level: int, x: Tensor, sigma: float, all_batches: list[slice], sums: TileAccumulator) -> None:
        """Adds up the denoised tiles of ``x`` at noise level ``sigma``."""
        cover, bound = self.tilings[level], self.config.signal_scale(level)
        t = float(time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
        noised = x / math.hypot(1.0, sigma)
        origins, boxes = cover.origins, cover.boxes
        like = x.new_empty(x.shape[0], 0, x.shape[1], *self.config.patch)
        mine = distributed.shard(all_batches)
        contexts = self._contexts(level, mine)
        for turn in range(tile_sharing.rounds(all_batches)):
            y = None
            if turn < len(mine):
                batch = mine[turn]
                tiles = extract_tiles(noised, origins[batch], self.config.patch, backend=self.model.kernels)
                v = self._denoise(level, tiles, boxes[batch], t, next(contexts))
                if self.copies == 2:
                    with_condition, without = v.chunk(2)
                    v = torch.lerp(without, with_condition, self.options.guidance)
                y = denoise(tiles.flatten(0, 1), v, torch.full((1,), t, device=self.device))
                y = (y.clamp_(-bound, bound) if self.options.clip else y).unflatten(0, tiles.shape[:2])
                self._count(level)
            for _, part in tile_sharing.exchange(all_batches, turn, y, like):
                sums.add(part)

    def _contexts(self, level: int, batches: Sequence[slice]) -> Iterator[Context | None]:
        if self.config.fusion == "shallow":
            return (self._shallow(level, batch) for batch in batches)
        if self.options.cache == "off":
            return (self._recomputed(level, batch) for batch in batches)
        return self.cache.contexts(self.ancestors[level], batches, self.model.fusing_blocks(level))

    def _shallow(self, level: int, batch: slice) -> Context | None:
        """For shallow fusion the context is the previous level's pixels, one tile of them for each tile."""
        if level == 0:
            return None
        cover, tiles = self.tilings[level - 1], self.ancestors[level][-1][batch]
        pixels = self._pixels(level - 1, self._clean_tiles(level - 1, cover.origins[tiles]), 0.0)
        boxes = cover.boxes[tiles].repeat(self.cache.videos, 1).to(self.device)
        index = torch.arange(len(boxes), device=self.device)[:, None]
        return Context({}, pixels.repeat(self.copies, 1, 1, 1, 1), (boxes,), index)

    def _recomputed(self, level: int, batch: slice) -> Context | None:
        """The context of a batch of tiles from scratch: the tiles that they descend from go through the network."""
        if level == 0:
            return None
        cache = ContextCache(self.device, self.cache.videos, on_host=False)

        def contexts(of: int, batches: Sequence[Tensor | slice]) -> Iterator[Context | None]:
            return cache.contexts(self.ancestors[of], batches, self.model.fusing_blocks(of))

        for below, needed in enumerate(lineage(self.ancestors, level, batch)):
            parts = needed.split(self.chunk)
            found = [self._clean_features(below, part, context) for part, context in zip(parts, contexts(below, parts))]
            kept = {b: torch.cat([features[b] for features in found], dim=1).flatten(0, 1) for b in found[0]}
            cache.finished.append(Finished(needed, self.tilings[below].boxes[needed], kept))
        return next(contexts(level, [batch]))

    @property
    def _caches(self) -> bool:
        """Whether a finished level leaves features behind."""
        return self.config.fusion == "deep" and self.options.cache != "off"

    def _keep_features(self, level: int) -> None:
        """Computes what the levels above need of a finished one: the features of all its (clean) tiles."""
        cover, videos, like = self.tilings[level], self.cache.videos, self.model.latents
        shape = (self.config.tokens, self.config.width)
        kept = {
            b: allocate((videos, cover.tiles, *shape), like, self.cache.on_host)
            for b in self.model.fusing_blocks(level + 1)
        }
        all_batches = tile_sharing.batches(cover.tiles, self.chunk)
        mine = distributed.shard(all_batches)
        contexts = self._contexts(level, mine)
        for turn in range(tile_sharing.rounds(all_batches)):
            found = None
            if turn < len(mine):
                found = self._clean_features(level, mine[turn], next(contexts))
                self._count(level)
            for b, whole in kept.items():
                part = None if found is None else found[b]
                for rows, got in tile_sharing.exchange(all_batches, turn, part, like.new_empty(videos, 0, *shape)):
                    whole[:, rows] = got
        tiles = torch.arange(cover.tiles)
        self.cache.finished.append(Finished(tiles, cover.boxes, {b: part.flatten(0, 1) for b, part in kept.items()}))

    def _count(self, level: int) -> None:
        """Reports a network call; those that only restore the features of an earlier run have no level's total."""
        self.done += 1
        if self.progress is not None and self.done <= self.calls:
            self.progress(level, self.done, self.calls)

    def _clean_tiles(self, level: int, origins: Tensor) -> Tensor:
        """Scaled tiles of a finished level, ``[B, n, C, f, h, w]``."""
        tiles = extract_tiles(self.videos[level], origins, self.config.patch, backend=self.model.kernels)
        return tiles * self.config.signal_scale(level)

    def _clean_features(self, level: int, tiles: Tensor | slice, context: Context | None) -> dict[int, Tensor]:
        """Features of tiles of a finished level for the levels above, per block ``[V, tiles, N, D]``."""
        cover = self.tilings[level]
        clean = self._clean_tiles(level, cover.origins[tiles])
        found = self.model.level_features(*self._inputs(level, clean, cover.boxes[tiles], 0.0, context))
        return {b: feature.unflatten(0, (self.cache.videos, -1)) for b, feature in found.items()}

    def _denoise(self, level: int, tiles: Tensor, boxes: Tensor, t: float, context: Context | None) -> Tensor:
        """Gives v for tiles; on level 0 a model with self-conditioning starts from the latents of the call before."""
        inputs = self._inputs(level, tiles, boxes, t, context)
        if level > 0 or not self.config.self_conditioning:
            return self.model.forward_level(*inputs)
        v, self.latents = self.model.forward_level(*inputs, latents=self.latents, return_latents=True)
        return v

    def _inputs(
        self, level: int, tiles: Tensor, boxes: Tensor, t: float, context: Context | None
    ) -> tuple[Tensor, int, Tensor, Tensor, Context | None, Tensor | None, Tensor | None, Tensor | None]:
        """What the network wants for tiles ``[B, n, C, f, h, w]``; rows ordered (guidance copy, video, tile)."""
        videos, n = self.copies * len(self.seeds), tiles.shape[1]
        return (
            self._pixels(level, tiles, t).repeat(self.copies, 1, 1, 1, 1),
            level,
            boxes.repeat(videos, 1).to(self.device),
            torch.full((videos * n,), t, device=self.device),
            context,
            None if self.labels is None else self.labels.repeat_interleave(n),
            None if self.text is None else self.text.repeat_interleave(n, dim=0),
            None if self.text_mask is None else self.text_mask.repeat_interleave(n, dim=0),
        )

    def _pixels(self, level: int, tiles: Tensor, t: float) -> Tensor:
        """Tiles ``[B, n, C, f, h, w]`` as the network's input ``[B * n, C, f, h, w]``."""
        time = torch.full((1,), t, device=self.device)
        return network_input(
            tiles.flatten(0, 1), time, torch.full((1,), self.config.signal_scale(level), device=self.device)
        )


def _generator(seed: int, level: int) -> torch.Generator:
    """A stream of its own for each level of a video, so that an interrupted run can go on with a later level."""
    (state,) = np.random.SeedSequence((seed, level)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)
