"""Hierarchical tiled sampling (paper section 4.4): level by level, each level tile by tile.

Level 0 is one patch. A later level is covered by overlapping tiles: at every step the network predicts each clean tile,
the predictions are averaged where tiles overlap (MultiDiffusion), and the whole video takes one step of the solver
(:mod:`hpdm.solvers`). The tiles' context comes from the finished levels (:mod:`hpdm.patch.finished_levels`). Tiles are
shared among the ranks of ``torch.distributed`` (:mod:`hpdm.patch.tile_sharing`).

Memory on a rank grows with the videos and with one batch of tiles, not with the number of tiles, except for the
features of finished levels, which are kept where ``SamplerOptions.cache`` says.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hpdm import distributed
from hpdm.patch import tile_sharing
from hpdm.patch.consistency import Consistency
from hpdm.patch.finished_levels import FinishedLevels, choose_contexts, keeps_features
from hpdm.patch.model import HPDM
from hpdm.patch.noise import level_generator
from hpdm.patch.seams import seam_energy
from hpdm.patch.tile_network import TileNetwork, VideoConditions, copies_of
from hpdm.patch.tiling import level_tiling
from hpdm.process import time_of_sigma
from hpdm.sampling import Progress, SamplerOptions
from hpdm.solvers import Solver
from hpdm_kernels import TileAccumulator, extract_tiles

logger = logging.getLogger(__name__)

HEUN_STEPS = 16
"""With fewer steps of the spacing "edm", Heun's method exaggerates detail by more than 15 % (docs/sampling.md)."""


class Sampler:
    """Samples whole videos from a model; see :class:`hpdm.sampling.Sampler`. Its parts are the levels.

    Args:
        model: in eval mode, on the device to sample on.
        options: see :class:`hpdm.sampling.SamplerOptions`.

    Raises:
        ValueError: tiles that cannot overlap as ``options`` require, or a ``sigma_min`` above the first noise level.
    """

    def __init__(self, model: HPDM, options: SamplerOptions | None = None) -> None:
        self.model, self.config = model, model.config
        self.options = options or SamplerOptions()
        self.tilings = [level_tiling(self.config, self.options, level) for level in range(self.config.levels)]
        scales = self.config.signal_scales
        self.solvers = [self.options.level_solver(level, signal) for level, signal in enumerate(scales)]
        self.contexts = choose_contexts(self.config, self.options)
        _warn_of_few_steps(self.options, self.solvers)

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
            seeds, labels, text, text_mask, progress, finished: as for :meth:`parts`.
            on_level: called as (level, videos) after every level that this call samples.

        Returns:
            The videos of every level, ``[B, C, F_l, H_l, W_l]`` float32 in [-1, 1]; the last one is the result.

        Raises:
            ValueError: as :meth:`parts`.
        """
        videos = [video.to(self.model.latents.device) for video in finished]
        for video in self.parts(seeds, labels, text, text_mask, progress, tuple(videos)):
            videos.append(video)
            if on_level is not None:
                on_level(len(videos) - 1, video)
        return videos

    @torch.no_grad()
    def parts(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        progress: Progress | None = None,
        finished: Sequence[Tensor] = (),
    ) -> Iterator[Tensor]:
        """Samples one video per seed and yields the videos of each level, ``[B, C, F_l, H_l, W_l]``, as it is finished.

        Args:
            seeds: B seeds. A video depends on its own seed and conditioning alone (up to rounding), not on the batch.
            labels: ``[B]`` int64 classes, for class conditioning; ``None`` for no class.
            text: ``[B, S, text_width]`` embeddings, for text conditioning; ``None`` for no text.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
            progress: called as (level, network calls done, network calls in all) after every network call.
            finished: videos of the first levels, from an interrupted call with the same seeds and conditioning.
                Sampling continues with the next level; they are not yielded again.

        Raises:
            ValueError: no seeds, labels out of range, not one text per seed, guidance without conditioning, or finished
                levels that do not match.
        """
        device = self.model.latents.device
        conditions = VideoConditions(self.config, self.options, len(seeds), labels, text, text_mask, device)
        levels = FinishedLevels(TileNetwork(self.model, self.options, conditions), self.tilings, finished, seeds)
        last, keeps = self.config.levels - 1, keeps_features(self.config, self.options)
        if keeps:
            for level in range(min(len(finished), last)):
                levels.keep_features(level)
        for level in range(len(finished), self.config.levels):
            called = _call_counter(progress, level, self._calls(levels, level))
            levels.add(self._sample_level(levels, level, seeds, called))
            if keeps and level < last:
                levels.keep_features(level, called)
            yield levels.videos[level]

    def seams(self, video: Tensor) -> dict[str, float]:
        """How visible tile borders are in one video ``[C, F, H, W]`` of the last level, by axis.

        See :func:`hpdm.patch.seams.seam_energy`.
        """
        return seam_energy(video, self.tilings[-1])

    def _sample_level(
        self, levels: FinishedLevels, level: int, seeds: Sequence[int], called: Callable[[], None]
    ) -> Tensor:
        """The videos of a level whose lower levels are finished, ``[B, C, F_l, H_l, W_l]``."""
        tiling, solver = self.tilings[level], self.solvers[level]
        shape = (self.config.channels, *tiling.size)
        generators = [level_generator(seed, level) for seed in seeds]
        tile_sums = TileAccumulator(tiling.origins, self.config.patch, tiling.size, backend=self.model.kernels)

        def noise() -> Tensor:
            # Drawn on the CPU, so that every device gets the same noise.
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(levels.network.device)

        consistency = self._consistency(levels, level)

        def update(x: Tensor, sigma: float, base: Tensor, alpha: float, beta: float) -> Tensor:
            for tiles in self._denoised_tiles(levels, level, x, sigma, called):
                tile_sums.add(tiles)
            combined = tile_sums.step(base, alpha, beta)
            return combined if consistency is None else consistency.correct_(combined, base, alpha, beta)

        y = solver.solve(update, noise)
        return (y / self.config.signal_scale(level)).clamp_(-1, 1)

    def _denoised_tiles(
        self, levels: FinishedLevels, level: int, x: Tensor, sigma: float, called: Callable[[], None]
    ) -> Iterator[Tensor]:
        """Predicts the scaled clean tiles of ``x`` at noise level ``sigma``, batch by batch in tile order.

        ``x`` is the solver's variable ``[B, C, F_l, H_l, W_l]``; yields ``[B, n, C, f, h, w]``.
        """
        # On the device once and not per network call, which then takes nothing from the host.
        origins, boxes = self.tilings[level].origins, self.tilings[level].boxes.to(levels.network.device)
        guidance = self._guidance(level, sigma)
        t = float(time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
        noised = x / math.hypot(1.0, sigma)  # x~ of hpdm.process
        batches = levels.batches(level, copies_of(guidance))
        contexts = self.contexts(levels, level, tile_sharing.shard(batches), copies_of(guidance))

        def compute(batch: slice) -> tile_sharing.Results:
            context = next(contexts)
            tiles = extract_tiles(noised, origins[batch], self.config.patch, backend=self.model.kernels)
            denoised = levels.network.denoise(level, tiles, boxes[batch], t, context, guidance)  # [B, n, C, f, h, w]
            called()
            return (denoised,)

        like = x.new_empty(x.shape[0], 0, x.shape[1], *self.config.patch)
        for _, (tiles,) in tile_sharing.shared(batches, compute, (like,)):
            yield tiles

    def _consistency(self, levels: FinishedLevels, level: int) -> Consistency | None:
        """What keeps a level in agreement with the one below, if there is one and the options ask for it."""
        if level == 0 or not self.options.consistency:
            return None
        below = levels.videos[level - 1] * self.config.signal_scale(level)
        return Consistency(below, self.config.ratio, self.options.consistency)

    def _guidance(self, level: int, sigma: float) -> float:
        """The guidance weight of a level at the solver's noise level ``sigma``."""
        return self.options.guidance_at(level, sigma, self.config.signal_scale(level))

    def _calls(self, levels: FinishedLevels, level: int) -> int:
        """Network calls that this rank makes for a level, including those that compute its features."""
        passes = [copies_of(self._guidance(level, sigma)) for sigma in self.solvers[level].prediction_sigmas()]
        if level < self.config.levels - 1 and keeps_features(self.config, self.options):
            passes.append(levels.copies)
        return sum(len(tile_sharing.shard(levels.batches(level, copies))) for copies in passes)


def _warn_of_few_steps(options: SamplerOptions, solvers: Sequence[Solver]) -> None:
    """Warns, on rank 0, of levels on which Heun's method exaggerates detail."""
    few = [n for n, s in enumerate(solvers) if s.method == "heun" and options.spacing == "edm" and s.steps < HEUN_STEPS]
    if few and distributed.is_first():
        name = "later_solver" if few[0] else "solver"
        logger.warning(
            "steps: got %d on level %d, expected at least %d for %s %r: fewer exaggerate detail; '2m' does not",
            solvers[few[0]].steps, few[0], HEUN_STEPS, name, getattr(options, name),
        )  # fmt: skip


def _call_counter(progress: Progress | None, level: int, calls: int) -> Callable[[], None]:
    """A function to call after every network call on a level; it reports to ``progress``."""
    done = 0

    def called() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(level, done, calls)

    return called
