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
from typing import NamedTuple

import torch
from torch import Tensor

from hpdm import distributed
from hpdm.frames import NOT_TRAINED, Known
from hpdm.noise import Purpose, level_generator, level_noise
from hpdm.patch import tile_sharing
from hpdm.patch.consistency import Consistency
from hpdm.patch.finished_levels import FinishedLevels, choose_contexts, keeps_features
from hpdm.patch.model import HPDM
from hpdm.patch.seams import seam_energy
from hpdm.patch.section import Section, level_section, whole
from hpdm.patch.tile_network import KnownTiles, TileNetwork, VideoConditions, copies_of, rows_of
from hpdm.patch.tiling import level_tiling
from hpdm.process import gamma, time_of_sigma
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
        known: Sequence[Known | None] = (),
        window: int = 0,
        before: Tensor | None = None,
        sparse: bool = False,
    ) -> list[Tensor]:
        """Samples one video per seed.

        Args:
            seeds, labels, text, text_mask, progress, finished, known, window, before, sparse: as for :meth:`parts`.
            on_level: called as (level, videos) after every level that this call samples.

        Returns:
            The videos of every level, ``[B, C, F_l, H_l, W_l]`` float32 in [-1, 1]; the last one is the result.

        Raises:
            ValueError: as :meth:`parts`.
        """
        videos = [video.to(self.model.latents.device) for video in finished]
        for video in self.parts(seeds, labels, text, text_mask, progress, tuple(videos), known, window, before, sparse):
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
        known: Sequence[Known | None] = (),
        window: int = 0,
        before: Tensor | None = None,
        sparse: bool = False,
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
            known: for each level the frames that are given, ``None`` for none: they come out as they are. Of tiles
                without other frames nothing is computed. A level of which all frames are known is not sampled.
            window: number of the window in a longer video: each has random streams of its own.
            before: level 0 of the window before, ``[B, C, f, h, w]``, for a model with memory.
            sparse: sample frames of level 0 that are far apart, for a model with a sparse storyline.

        Raises:
            ValueError: no seeds, labels out of range, not one text per seed, guidance without conditioning, finished
                levels or known frames that do not match, or some known frames for a model that was not trained so.
        """
        device = self.model.latents.device
        conditions = VideoConditions(self.config, self.options, len(seeds), labels, text, text_mask, device)
        given = self._check_known(known, len(seeds))
        network = TileNetwork(self.model, self.options, conditions)
        network.sparse = sparse
        if before is not None:
            network.remember(before)
        # Without known frames the features of all tiles are kept.
        sections = [None if n < len(finished) else self._section(n, part) for n, part in enumerate(given)]
        needed = None if all(part is None for part in given) else sections
        levels = FinishedLevels(network, self.tilings, finished, seeds, window, needed)
        last, keeps = len(self.tilings) - 1, keeps_features(self.config, self.options)
        if keeps:
            for level in range(min(len(finished), last)):
                levels.keep_features(level)
        for level in range(len(finished), len(self.tilings)):
            section, part = sections[level], given[level]
            called = _call_counter(progress, level, self._calls(levels, level, section))
            if section is not None:
                levels.add(self._sample_level(levels, level, section, part, called))
            elif part is not None:
                levels.add(part.video.to(device))
            if keeps and level < last:
                levels.keep_features(level, called)
            yield levels.videos[level]

    def seams(self, video: Tensor) -> dict[str, float]:
        """How visible tile borders are in one video ``[C, F, H, W]`` of the last level, by axis.

        See :func:`hpdm.patch.seams.seam_energy`.
        """
        return seam_energy(video, self.tilings[-1])

    def _sample_level(
        self, levels: FinishedLevels, level: int, section: Section, known: Known | None, called: Callable[[], None]
    ) -> Tensor:
        """The videos of a level whose lower levels are finished, ``[B, C, F_l, H_l, W_l]``."""
        frames = slice(section.frames.start, section.frames.stop)
        size = (len(section.frames), *self.tilings[level].size[1:])
        purpose: Purpose = "sparse" if levels.network.sparse else "sampling"
        generators = [level_generator(seed, level, purpose, levels.window) for seed in levels.seeds]
        tile_sums = TileAccumulator(section.origins, self.config.patch, size, backend=self.model.kernels)
        shown = None if known is None else self._show(levels, level, known, section)

        def noise() -> Tensor:
            # Drawn on the CPU, so that every device gets the same noise.
            shape = (self.config.channels, *size)
            return torch.stack([self._noise(shape, g) for g in generators]).to(levels.network.device)

        consistency = self._consistency(levels, level, frames)

        def update(x: Tensor, sigma: float, base: Tensor, alpha: float, beta: float) -> Tensor:
            for tiles in self._denoised_tiles(levels, level, section, shown, x, sigma, called):
                tile_sums.add(tiles)
            combined = tile_sums.step(base, alpha, beta)
            if shown is not None:  # before, too: what was predicted of known frames must not reach the others
                shown.put_step_(combined, base, alpha, beta)
            if consistency is not None:
                combined = consistency.correct_(combined, base, alpha, beta)
                if shown is not None:
                    shown.put_step_(combined, base, alpha, beta)
            return combined

        y = self.solvers[level].solve(update, noise)
        y = (y / self.config.signal_scale(level)).clamp_(-1, 1)
        if known is None:
            return y
        video = known.video.to(y, copy=True)
        unknown = ~section.known
        video[:, :, frames][:, :, unknown] = y[:, :, unknown]
        return video

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal noise of one video of a level, ``shape`` being (C, F_l, H_l, W_l)."""
        return torch.randn(shape, generator=generator)

    def _denoised_tiles(
        self, levels: FinishedLevels, level: int, section: Section, shown: Shown | None, x: Tensor, sigma: float,
        called: Callable[[], None],
    ) -> Iterator[Tensor]:  # fmt: skip
        """Predicts the scaled clean tiles of ``x`` at noise level ``sigma``, batch by batch in tile order.

        ``x`` is the solver's variable ``[B, C, n, H_l, W_l]``, the frames of the section; yields
        ``[B, n, C, f, h, w]``.
        """
        first = section.tiles.start
        # On the device once and not per network call, which then takes nothing from the host.
        boxes = self.tilings[level].boxes.to(levels.network.device)
        guidance, frame_guidance = self._guidance(level, sigma), self._frame_guidance(level, shown is not None)
        t = float(time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
        noised = x / math.hypot(1.0, sigma)  # x~ of hpdm.process
        knowing = noised if shown is None else shown.put_into(noised)
        batches = levels.batches(section.tiles, rows_of(guidance, frame_guidance))
        contexts = self.contexts(levels, level, tile_sharing.shard(batches), copies_of(guidance))

        def compute(batch: slice) -> tile_sharing.Results:
            context = next(contexts)
            own = slice(batch.start - first, batch.stop - first)

            def tiles_of(video: Tensor) -> Tensor:
                return extract_tiles(video, section.origins[own], self.config.patch, backend=self.model.kernels)

            tiles, known = tiles_of(knowing), None
            if shown is not None:
                known = KnownTiles(tiles, torch.where(shown.known_tokens[own], shown.t, t), frame_guidance)
                tiles = tiles_of(noised) if frame_guidance else tiles
            denoised = levels.network.denoise(level, tiles, boxes[batch], t, context, guidance, known)
            called()
            return (denoised,)  # [B, n, C, f, h, w]

        like = x.new_empty(x.shape[0], 0, x.shape[1], *self.config.patch)
        for _, (tiles,) in tile_sharing.shared(batches, compute, (like,)):
            yield tiles

    def _check_known(self, known: Sequence[Known | None], videos: int) -> list[Known | None]:
        """The known frames of every level, where there are any."""
        if len(known) > len(self.tilings):
            raise ValueError(f"known: got {len(known)} levels, expected at most {len(self.tilings)}")
        given: list[Known | None] = [None] * len(self.tilings)
        for level, part in enumerate(known):
            if part is None or not bool(part.frames.any()):
                continue
            expected = (videos, self.config.channels, *self.tilings[level].size)
            if tuple(part.video.shape) != expected or tuple(part.frames.shape) != (expected[2],):
                raise ValueError(
                    f"known: got videos of {tuple(part.video.shape)} on level {level}, expected {expected}, and "
                    f"{expected[2]} frames"
                )
            if not self.config.known_frames and not part.all:
                raise ValueError(f"known: got some frames of level {level}, expected none: {NOT_TRAINED}")
            given[level] = part
        return given

    def _section(self, level: int, known: Known | None) -> Section | None:
        """What is sampled of a level; ``None`` for nothing."""
        if known is None:
            return whole(self.tilings[level])
        return None if known.all else level_section(self.config, self.options, self.tilings[level], level, known.frames)

    def _show(self, levels: FinishedLevels, level: int, known: Known, section: Section) -> Shown | None:
        """The known frames of a section as the network sees them; ``None`` if all its frames are unknown."""
        if section.known_tokens is None or not bool(section.known.any()):
            return None
        device, time = levels.network.device, self.options.level_known_noise(level)
        y = known.video[:, :, section.frames.start : section.frames.stop][:, :, section.known].to(device)
        y = y * self.config.signal_scale(level)
        g = float(gamma(torch.tensor(time, dtype=torch.float64)))
        purpose: Purpose = "known sparse" if levels.network.sparse else "known"
        noise = level_noise(levels.seeds, level, tuple(y.shape[1:]), purpose, levels.window).to(y)
        noised = y * g**0.5 + noise * (1 - g) ** 0.5
        frames = section.known.nonzero()[:, 0].to(device)
        return Shown(frames, y, noised, time, section.known_tokens.to(device))

    def _consistency(self, levels: FinishedLevels, level: int, frames: slice) -> Consistency | None:
        """What keeps a level in agreement with the one below, if there is one and the options ask for it."""
        if level == 0 or not self.options.consistency:
            return None
        ratio = self.config.ratio[0]
        below = levels.videos[level - 1][:, :, frames.start // ratio : frames.stop // ratio]
        below = below * self.config.signal_scale(level)
        return Consistency(below, self.config.ratio, self.options.consistency)

    def _guidance(self, level: int, sigma: float) -> float:
        """The guidance weight of a level at the solver's noise level ``sigma``."""
        return self.options.guidance_at(level, sigma, self.config.signal_scale(level))

    def _frame_guidance(self, level: int, knows: bool) -> float:
        """The weight of guidance by known frames on a level, if there are any."""
        return self.options.frame_guidance if level == 0 and knows else 0.0

    def _calls(self, levels: FinishedLevels, level: int, section: Section | None) -> int:
        """Network calls that this rank makes for a level, including those that compute its features."""
        calls = 0
        if section is not None:
            knows = bool(section.known.any())
            for sigma in self.solvers[level].prediction_sigmas():
                rows = rows_of(self._guidance(level, sigma), self._frame_guidance(level, knows))
                calls += len(tile_sharing.shard(levels.batches(section.tiles, rows)))
        if level < len(self.tilings) - 1 and keeps_features(self.config, self.options):
            calls += len(tile_sharing.shard(levels.feature_batches(level)))
        return calls


class Shown(NamedTuple):
    """The known frames of a section of a level, as the network sees them."""

    frames: Tensor
    """Their numbers in the section, int64 ``[n]``."""
    clean: Tensor
    """Scaled, ``y [B, C, n, H, W]``."""
    noised: Tensor
    """``x~`` at their own time, ``[B, C, n, H, W]``."""
    t: float
    """That time."""
    known_tokens: Tensor
    """Frames of tokens that are known in every tile, bool ``[tiles, F]``."""

    def put_step_(self, combined: Tensor, base: Tensor, alpha: float, beta: float) -> None:
        """Writes ``alpha * base + beta * y`` of the known frames into ``combined [B, C, F, H, W]``."""
        combined[:, :, self.frames] = alpha * base[:, :, self.frames] + beta * self.clean

    def put_into(self, noised: Tensor) -> Tensor:
        """A copy of the section's ``x~ [B, C, F, H, W]`` with the known frames in place."""
        return noised.index_copy(2, self.frames, self.noised)


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
