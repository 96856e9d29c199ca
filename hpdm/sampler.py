"""Hierarchical tiled sampling (paper section 4.4): level by level, each level tile by tile.

Level 0 is one patch. A later level is covered by tiles; at every step the tiles' denoised predictions are averaged
where they overlap (MultiDiffusion) and the whole video takes one step. A finished level is clean, so the block inputs
of its tiles are computed once and serve as context for all tiles and steps above (section 4.5, "Cached inference").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hpdm.diffusion import T_MAX, denoise, gamma, network_input, sampling_times, time_of_sigma
from hpdm.model import HPDM, Context
from hpdm.pyramid import Tiling, parse_overlap, tiling
from hpdm_kernels import average_tiles, extract_tiles

Progress = Callable[[int, int, int], None]
"""Called as (level, network calls done, network calls in all) after every call on that level."""


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
    overlap: str = "fhw"
    """Axes on which tiles overlap by 50 %: "none" or some of the letters f, h, w (Table 4)."""
    guidance: float = 1.0
    """Classifier-free guidance weight; 1 is none, 0 is unconditional."""
    churn: float = 10.0
    """Stochasticity on level 0, EDM's S_churn; 0 makes it deterministic."""
    churn_range: tuple[float, float] = (0.05, 50.0)
    """Noise levels sigma between which churn acts, EDM's S_tmin and S_tmax."""
    second_order: bool = True
    """Heun's correction on level 0. Later levels are first order: a correction there made grain (appendix D.3)."""
    clip: bool = True
    """Clamp predictions to the range of pixels."""
    tile_batch: int = 64
    """Patches per network call, guidance counted twice."""

    def __post_init__(self) -> None:
        parse_overlap(self.overlap)
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1")
        if not 0 < self.steps_decay <= 1:
            raise ValueError(f"steps_decay: got {self.steps_decay}, expected a factor in (0, 1]")
        if self.churn < 0:
            raise ValueError(f"churn: got {self.churn}, expected at least 0")
        if self.tile_batch < 1:
            raise ValueError(f"tile_batch: got {self.tile_batch}, expected at least 1")

    def level_steps(self, level: int) -> int:
        """Steps on a level, at least one."""
        return max(1, round(self.steps * self.steps_decay**level))


@dataclass(frozen=True)
class _Finished:
    """A finished level as its tiles' features, for the levels above."""

    tiling: Tiling
    boxes: Tensor  # [rows, 6]
    features: dict[int, Tensor]  # block -> [rows, N, D]
    pixels: Tensor | None  # [rows, C, f, h, w], for shallow fusion


class Sampler:
    """Samples whole videos from a model.

    Args:
        model: in eval mode, on the device to sample on.
        options: see :class:`SamplerOptions`.
    """

    def __init__(self, model: HPDM, options: SamplerOptions | None = None) -> None:
        self.model = model
        self.options = options or SamplerOptions()
        self.config = model.config
        self.overlap = parse_overlap(self.options.overlap)
        self.tilings = [tiling(self.config, n, self.overlap) for n in range(self.config.levels)]

    @torch.no_grad()
    def __call__(
        self,
        seeds: Sequence[int],
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """Samples one video per seed.

        Args:
            seeds: B seeds. A video depends on its own seed and conditioning alone (up to rounding), not on the batch.
            labels: ``[B]`` int64 classes, for class conditioning; ``None`` for no class.
            text: ``[B, S, text_width]`` embeddings, for text conditioning.
            text_mask: ``[B, S]`` bool.
            progress: called after every network call.

        Returns:
            The videos of every level, ``[B, C, F_l, H_l, W_l]`` float32 in [-1, 1]; the last one is the result.

        Raises:
            ValueError: no seeds, labels out of range, or guidance without conditioning.
        """
        batch = len(seeds)
        if batch == 0:
            raise ValueError("seeds: got none, expected at least one")
        guided = self.options.guidance != 1.0
        if guided and labels is None and text is None:
            raise ValueError(f"guidance: got {self.options.guidance} without labels or text, expected 1")
        device = self.model.latents.device
        if labels is not None:
            if tuple(labels.shape) != (batch,) or labels.min() < 0 or labels.max() > self.config.classes:
                raise ValueError(f"labels: got {labels.tolist()}, expected {batch} in 0..{self.config.classes - 1}")
            labels = labels.to(device)
            if guided:
                labels = torch.cat((labels, torch.full_like(labels, self.config.classes)))
        if text is not None:
            text = text.to(device)
            mask = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
            text_mask = mask.to(device)
            if guided:
                text, text_mask = text.repeat(2, 1, 1), torch.cat((text_mask, torch.zeros_like(text_mask)))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        run = _Run(self, batch, 2 if guided else 1, labels, text, text_mask, device, progress)
        videos: list[Tensor] = []
        for level in range(self.config.levels):
            videos.append(self._sample_level(run, level, generators))
            if level + 1 < self.config.levels:
                run.finish(level, videos[-1])
        return videos

    def _sample_level(self, run: _Run, level: int, generators: list[torch.Generator]) -> Tensor:
        times = sampling_times(self.options.level_steps(level))
        calls = len(times) - 1
        if level == 0:
            run.begin(level, 2 * calls - 1 if self.options.second_order else calls)
            y = self._stochastic(run, times, generators)
        else:
            run.begin(level, calls)
            y = self._deterministic(run, level, times, generators)
        return (y / self.config.signal_scale(level)).clamp_(-1, 1)

    def _deterministic(self, run: _Run, level: int, times: list[float], generators: list[torch.Generator]) -> Tensor:
        """First-order deterministic steps (DDIM), each ``x <- alpha x + beta mean of the tiles' predictions``."""
        cover = self.tilings[level]
        x = _noise(generators, (self.config.channels, *cover.size), run.device)
        origins = cover.origins
        for now, then in pairwise(times):
            tiles = run.predict(level, x, now)
            (signal, noise), (signal_then, noise_then) = _rates(now), _rates(then)
            alpha = noise_then / noise
            x = average_tiles(
                tiles,
                origins,
                cover.size,
                x=x,
                alpha=alpha,
                beta=signal_then - signal * alpha,
                backend=self.model.kernels,
            )
        return x

    def _stochastic(self, run: _Run, times: list[float], generators: list[torch.Generator]) -> Tensor:
        """EDM's Algorithm 2 (churn, then Heun) on level 0, in its variable ``x~ / sqrt(g) = y + sigma e``."""
        o, steps = self.options, len(times) - 1
        shape = (self.config.channels, *self.config.patch)
        sigmas = [math.tan(math.pi / 2 * t) for t in times]
        x = _noise(generators, shape, run.device) * math.hypot(1.0, sigmas[0])
        limit = math.tan(math.pi / 2 * T_MAX)
        for sigma, sigma_then in pairwise(sigmas):
            lively = o.churn > 0 and o.churn_range[0] <= sigma <= o.churn_range[1]
            raised = min(sigma * (1 + min(o.churn / steps, math.sqrt(2) - 1)), limit) if lively else sigma
            if raised > sigma:
                x = x + math.sqrt(raised**2 - sigma**2) * _noise(generators, shape, run.device)
            slope = (x - self._denoised(run, x, raised)) / raised
            ahead = x + (sigma_then - raised) * slope
            if o.second_order and sigma_then > 0:
                slope_then = (ahead - self._denoised(run, ahead, sigma_then)) / sigma_then
                ahead = x + (sigma_then - raised) * (slope + slope_then) / 2
            x = ahead
        return x

    def _denoised(self, run: _Run, x: Tensor, sigma: float) -> Tensor:
        t = float(time_of_sigma(torch.tensor(sigma, dtype=torch.float64)))
        return run.predict(0, x / math.hypot(1.0, sigma), t)[:, 0]


class _Run:
    """One call of the sampler: its conditioning, its finished levels, and the network calls over tiles."""

    def __init__(
        self,
        sampler: Sampler,
        batch: int,
        copies: int,
        labels: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.sampler, self.model, self.config, self.options = sampler, sampler.model, sampler.config, sampler.options
        self.batch, self.copies, self.device = batch, copies, device
        self.labels, self.text, self.text_mask = labels, text, text_mask
        self.progress = progress
        self.finished: list[_Finished] = []
        self.ancestors: list[Tensor] = []  # per level below, [T] rows of that level's tiles

    def begin(self, level: int, predictions: int) -> None:
        """Looks up, once per level, which finished tiles are the ancestors of this level's tiles."""
        boxes = self.sampler.tilings[level].boxes
        self.ancestors = [f.tiling.containing(boxes) for f in self.finished]
        per_prediction = math.ceil(self.sampler.tilings[level].tiles / self._chunk())
        self.level, self.done, self.calls = level, 0, predictions * per_prediction

    def predict(self, level: int, x: Tensor, t: float) -> Tensor:
        """Denoised tiles ``[B, T, C, f, h, w]`` of the noised video ``x [B, C, F, H, W]`` at time ``t``."""
        cover = self.sampler.tilings[level]
        origins, boxes = cover.origins, cover.boxes
        out = x.new_empty((self.batch, cover.tiles, self.config.channels, *self.config.patch))
        bound = self.config.signal_scale(level)
        for first in range(0, cover.tiles, self._chunk()):
            rows = slice(first, min(first + self._chunk(), cover.tiles))
            tiles = extract_tiles(x, origins[rows], self.config.patch, backend=self.model.kernels)
            v, _ = self._network(level, tiles, boxes[rows], rows, t)
            if self.copies == 2:
                with_condition, without = v.chunk(2)
                v = torch.lerp(without, with_condition, self.options.guidance)
            time = torch.full((1,), t, device=self.device)
            y = denoise(tiles.flatten(0, 1), v, time)
            out[:, rows] = (y.clamp_(-bound, bound) if self.options.clip else y).unflatten(0, (self.batch, -1))
            self.done += 1
            if self.progress is not None:
                self.progress(self.level, self.done, self.calls)
        return out

    def finish(self, level: int, video: Tensor) -> None:
        """Computes what the levels above need of a finished one: the block inputs of all its (clean) tiles."""
        cover = self.sampler.tilings[level]
        origins, boxes = cover.origins, cover.boxes
        wanted = self.model.fusing_blocks(level + 1)
        scale = self.config.signal_scale(level)
        features: dict[int, list[Tensor]] = {b: [] for b in wanted}
        pixels: list[Tensor] = []
        for first in range(0, cover.tiles, self._chunk()):
            rows = slice(first, min(first + self._chunk(), cover.tiles))
            tiles = extract_tiles(video, origins[rows], self.config.patch, backend=self.model.kernels) * scale
            if self.config.fusion == "shallow":
                clean = self._input(level, tiles, 0.0).unflatten(0, (self.batch, -1))
                pixels.append(clean.repeat(self.copies, 1, 1, 1, 1, 1))
                continue
            _, found = self._network(level, tiles, boxes[rows], rows, 0.0, wanted)
            for b, feature in found.items():
                features[b].append(feature.unflatten(0, (self.copies * self.batch, -1)))
        self.finished.append(
            _Finished(
                cover,
                boxes.repeat(self.copies * self.batch, 1).to(self.device),
                {b: torch.cat(parts, dim=1).flatten(0, 1) for b, parts in features.items() if parts},
                torch.cat(pixels, dim=1).flatten(0, 1) if pixels else None,
            )
        )

    def _chunk(self) -> int:
        """Tiles per network call, of every video and both guidance branches at once."""
        return max(1, self.options.tile_batch // (self.batch * self.copies))

    def _input(self, level: int, tiles: Tensor, t: float) -> Tensor:
        flat = tiles.flatten(0, 1)
        time = torch.full((1,), t, device=self.device)
        return network_input(flat, time, torch.full((1,), self.config.signal_scale(level), device=self.device))

    def _network(
        self, level: int, tiles: Tensor, boxes: Tensor, rows: slice, t: float, wanted: Sequence[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Gives v and block inputs for tiles ``[B, n, C, f, h, w]``; rows ordered (guidance copy, video, tile)."""
        videos, n = self.copies * self.batch, tiles.shape[1]
        return self.model.forward_level(
            self._input(level, tiles, t).repeat(self.copies, 1, 1, 1, 1),
            level,
            boxes.repeat(videos, 1).to(self.device),
            torch.full((videos * n,), t, device=self.device),
            self._context(level, rows, videos),
            None if self.labels is None else self.labels.repeat_interleave(n),
            None if self.text is None else self.text.repeat_interleave(n, dim=0),
            None if self.text_mask is None else self.text_mask.repeat_interleave(n, dim=0),
            wanted,
        )

    def _context(self, level: int, rows: slice, videos: int) -> Context | None:
        if level == 0:
            return None
        below = self.finished[:level]
        index = [
            (torch.arange(videos)[:, None] * f.tiling.tiles + ancestor[rows]).flatten()
            for f, ancestor in zip(below, self.ancestors)
        ]
        return Context(
            {b: tuple(f.features[b] for f in below) for b in self.model.fusing_blocks(level)},
            below[-1].pixels,
            tuple(f.boxes for f in below),
            torch.stack(index, dim=1).to(self.device),
        )


def _rates(t: float) -> tuple[float, float]:
    """``sqrt(g), sqrt(1 - g)`` in double precision: the steps are built from their differences."""
    g = float(gamma(torch.tensor(t, dtype=torch.float64)))
    return math.sqrt(g), math.sqrt(1 - g)


def _noise(generators: list[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """One standard normal sample per generator, drawn on the CPU so that every device sees the same."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
