"""The cost of sampling, predicted before it starts: tiles, network calls, FLOPs, memory, time."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpdm.patch import tile_sharing
from hpdm.patch.config import HPDMConfig
from hpdm.patch.context import Context
from hpdm.patch.finished_levels import keeps_features
from hpdm.patch.model import HPDM
from hpdm.patch.objective import example_inputs
from hpdm.patch.tile_network import copies_of, feature_copies, tiles_per_call
from hpdm.patch.tiling import find_ancestors, level_tiling, lineage
from hpdm.planning.ledger import Ledger, fake_fp32
from hpdm.sampling import SamplerOptions
from hpdm.solvers import HELD

FP32 = 4


@dataclass(frozen=True)
class LevelPlan:
    """The predicted cost of sampling one level of one video."""

    level: int
    resolution: tuple[int, int, int]
    tiles: int
    steps: int
    predictions: int
    """Denoising passes over the whole level; the solvers "edm" and "heun" take two per step, and one in the last."""
    network_calls: int
    """Network calls on batches of at most ``tile_batch`` patches, including those that fill the cache. With cache "off"
    the calls that compute context are not counted."""
    patches: int
    """Patches that go through the network, guidance counted twice."""
    flops: int
    """FLOPs of matrix products and attention."""
    cached_blocks: int
    """Blocks whose inputs are kept for the levels above."""
    cache_bytes: int
    """Memory of these inputs in fp32."""


def sampling_plan(config: HPDMConfig, options: SamplerOptions | None = None) -> list[LevelPlan]:
    """Tiles, network calls, FLOPs and cached features of each level, for sampling one video with ``options``."""
    options = options or SamplerOptions()
    deep = config.fusion == "deep"
    kept_copies = feature_copies(options)
    tilings = [level_tiling(config, options, level) for level in range(config.levels)]
    ancestors = find_ancestors(tilings)
    flops_of_features = [feature_flops(config, level) for level in range(config.levels - 1)] if deep else []
    plans = []
    for level, tiling in enumerate(tilings):
        tiles, copies = tiling.tiles, prediction_copies(config, options, level)
        keeps = keeps_features(config, options) and level < config.levels - 1
        cached = sum(n > level + 1 for n in config.levels_per_block) if keeps else 0
        # Rows of finished levels' tiles, per level, that go through the network for their features.
        clean = [0] * config.levels
        if keeps:
            clean[level] = kept_copies * tiles  # this level's tiles, once, when it is finished
        elif deep and options.cache == "off":  # again for every prediction
            for n, count in Counter(copies).items():
                needed = _tiles_below(ancestors, level, tiles, tiles_per_call(options, 1, n))
                for below, needed_below in enumerate(needed):
                    clean[below] += count * n * needed_below
        denoised = sum(copies) * tiles
        calls = [*copies, *([kept_copies] if keeps else [])]
        flops = denoised * patch_flops(config, level) + sum(n * f for n, f in zip(clean, flops_of_features))
        plans.append(
            LevelPlan(
                level=level,
                resolution=config.level_resolution(level),
                tiles=tiles,
                steps=options.level_steps(level),
                predictions=len(copies),
                network_calls=sum(math.ceil(tiles / tiles_per_call(options, 1, n)) for n in calls),
                patches=denoised + sum(clean),
                flops=flops,
                cached_blocks=cached,
                cache_bytes=kept_copies * tiles * cached * config.tokens * config.width * FP32,
            )
        )
    return plans


def prediction_copies(config: HPDMConfig, options: SamplerOptions, level: int) -> list[int]:
    """Rows per tile of each denoised prediction of a level: 2 where it is guided, else 1."""
    signal = config.signal_scale(level)
    sigmas = options.level_solver(level, signal).prediction_sigmas()
    return [copies_of(options.guidance_at(level, sigma, signal)) for sigma in sigmas]


def _tiles_below(ancestors: Sequence[Sequence[Tensor]], level: int, tiles: int, per_call: int) -> list[int]:
    """For each level below ``level``, the number of tiles that its batches depend on, counted for each batch."""
    counts = [0] * level
    for batch in tile_sharing.batches(range(tiles), per_call):
        for below, needed in enumerate(lineage(ancestors, level, batch)):
            counts[below] += len(needed)
    return counts


# A plan, the memory and the time of one sampling need the same counts, which take a part of a second each.
@functools.cache
def patch_flops(config: HPDMConfig, level: int) -> int:
    """FLOPs (matrix products and attention) of denoising one patch of one level while sampling, kernels on."""
    return _flops(config, lambda model: _call(model, level, 1))


@functools.cache
def feature_flops(config: HPDMConfig, level: int) -> int:
    """FLOPs of the features of one clean patch for the levels above."""
    return _flops(config, lambda model: model.level_features(**_inputs(model, level, 1)))


def _flops(config: HPDMConfig, call: Callable[[HPDM], object]) -> int:
    """FLOPs of a call of the model, counted on fake tensors."""
    with fake_fp32(), torch.no_grad():
        model = HPDM(config, kernels="torch")
        with Ledger() as ledger:
            call(model)
    return ledger.flops


def _inputs(model: HPDM, level: int, batch: int) -> dict[str, Any]:
    """Arguments of :meth:`HPDM.forward_level` for ``batch`` patches of one level, which share one row of context."""
    config, device = model.config, model.latents.device
    inputs = {name: torch.zeros_like(tensor, device=device) for name, tensor in example_inputs(config, batch).items()}
    context = None
    if level:
        below = torch.empty(1, config.tokens, config.width, device=device)
        context = Context(
            features=dict.fromkeys(model.fusing_blocks(level), (below,) * level),
            pixels=torch.empty(1, config.channels, *config.patch, device=device)
            if config.fusion == "shallow"
            else None,
            boxes=(torch.empty(1, 6, device=device),) * level,
            index=torch.zeros(batch, level, dtype=torch.long, device=device),
        )
    patches = {name: inputs[name][:, level] for name in ("x", "boxes", "t")}
    conditioning = {name: inputs[name] for name in ("labels", "text") if name in inputs}
    return patches | conditioning | {"level": level, "context": context}


def _call(model: HPDM, level: int, batch: int) -> torch.Tensor:
    """V for ``batch`` patches of one level, as the sampler calls the network."""
    inputs = _inputs(model, level, batch)
    if level > 0 or not model.config.self_conditioning:
        return model.forward_level(**inputs)
    return model.forward_level_with_latents(**inputs, latents=model.latents.new_empty(batch, *model.latents.shape))[0]


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of fp32 memory while the last level is sampled, without the command's inputs and the CUDA runtime."""

    weights: int
    features: int
    """Features of finished levels on the model's device: all with cache "gpu", those of a batch of tiles with "off", of
    two batches with "cpu"."""
    host_features: int
    """Features of finished levels in host memory: all with cache "cpu", else none."""
    videos: int
    """Videos of the finished levels, twice with context noise, and copies of the last one: sample, scaled sample and
    sums of tiles; in second order also what the solver keeps, one video for "2m" and two for "edm" and "heun"."""
    network: int
    """The peak of one network call, its tiles included."""

    @property
    def device_bytes(self) -> int:
        """Memory on the model's device."""
        return self.weights + self.features + self.videos + self.network


def sampling_memory(config: HPDMConfig, options: SamplerOptions, videos: int = 1) -> SamplingMemory:
    """Predicts the memory of sampling ``videos`` at a time.

    It is ``weights + features + videos + network``; only ``features`` depends on the number of tiles::

        features = V sum_l T_l blocks_l N D        (cache "gpu"; V videos with their guidance copies)
        videos   = B C (sum_{l < L-1} F_l H_l W_l + 3 F H W)       (4 F H W with "2m", 5 F H W with "edm" and "heun")
                   and one more of level L-2 with consistency
        network  = peak of one call on tile_batch patches
    """
    last = config.levels - 1
    copies = max(prediction_copies(config, options, last))
    patches = videos * copies * min(tiles_per_call(options, videos, copies), level_tiling(config, options, last).tiles)
    with fake_fp32(), torch.no_grad():
        model = HPDM(config, kernels="torch")
        weights = sum(p.numel() for p in model.parameters()) * FP32
        with Ledger() as ledger:
            ledger.label(model.parameters(), "weights")
            _call(model, last, patches)
    at_peak = ledger.at_peak()
    # In addition to the call: its tiles and the prediction.
    tile = patches * config.channels * math.prod(config.patch) * FP32
    plans = sampling_plan(config, replace(options, cache="gpu"))
    cached = videos * sum(plan.cache_bytes for plan in plans)
    # Features that one batch needs: at most one row per patch, and at most the tiles that a level has. With cache "cpu"
    # only those of the blocks that fuse into the last level are copied; with "off" those of all fusing blocks are kept.
    row = config.tokens * config.width * FP32
    fusing = [plans[-2].cached_blocks if options.cache == "cpu" else plan.cached_blocks for plan in plans[:-1]]
    batch = sum(min(patches, videos * copies * plan.tiles) * n * row for plan, n in zip(plans, fusing))
    features = {"gpu": cached, "cpu": min(cached, 2 * batch), "off": batch}[options.cache]
    per_level = [videos * config.channels * math.prod(plan.resolution) * FP32 for plan in plans]
    finished = sum(per_level[:-1]) * (2 if options.context_noise else 1)
    below = per_level[-2] if options.consistency and last else 0  # scaled, to compare predictions with
    solving = HELD[options.level_solver(last).method] * per_level[-1]
    return SamplingMemory(
        weights=weights,
        features=features,
        host_features=cached if options.cache == "cpu" else 0,
        videos=finished + below + solving,
        network=sum(n for name, n in at_peak.items() if name != "weights") + 2 * tile,
    )


def seconds_per_patch(model: HPDM) -> float:
    """Measured time of the network per patch of level 0, where all blocks run; the batch is 8 on a GPU, else 1."""
    on_gpu = model.latents.device.type == "cuda"
    batch = 8 if on_gpu else 1

    def call() -> float:
        begin = time.perf_counter()
        _call(model, 0, batch)
        if on_gpu:
            torch.cuda.synchronize(model.latents.device)
        return (time.perf_counter() - begin) / batch

    with torch.no_grad():
        return min(call() for _ in range(2))


def plan_line(model: HPDM, options: SamplerOptions, videos: int, at_a_time: int, processes: int = 1) -> str:
    """One line to print before sampling: tiles, steps, patches, FLOPs, expected memory and time.

    Args:
        model: on the device to sample on; two network calls are timed.
        options: how to sample.
        videos: number of videos in all.
        at_a_time: videos per call of the sampler.
        processes: number of processes that share the tiles.
    """
    config = model.config
    plans = sampling_plan(config, options)
    memory = sampling_memory(config, options, at_a_time)
    flops = videos * sum(plan.flops for plan in plans)
    seconds = seconds_per_patch(model) * flops / patch_flops(config, 0) / processes
    host = f" and {memory.host_features / 1e9:.2f} GB of host memory" if memory.host_features else ""
    return (
        f"tiles per level {'/'.join(str(p.tiles) for p in plans)}, steps {'/'.join(str(p.steps) for p in plans)}, "
        f"{videos * sum(p.patches for p in plans)} patches, {flops / 1e12:.3g} TFLOP; "
        f"about {memory.device_bytes / 1e9:.2f} GB{host}, about {duration(seconds)}"
    )


def duration(seconds: float) -> str:
    """``"8 s"``, ``"12 min"`` or ``"3 h 20 min"``."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
