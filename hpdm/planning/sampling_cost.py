"""What sampling will take, before it starts: tiles, network calls, work, memory, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from hpdm.patch import tile_sharing
from hpdm.patch.config import HPDMConfig
from hpdm.patch.context_cache import find_ancestors, lineage
from hpdm.patch.model import HPDM, Context
from hpdm.patch.sampler import SamplerOptions
from hpdm.planning.training_cost import Ledger, example_inputs, fake_fp32

FP32 = 4


@dataclass(frozen=True)
class LevelPlan:
    """Sampling one level of one video."""

    level: int
    resolution: tuple[int, int, int]
    tiles: int
    steps: int
    predictions: int
    """Denoising passes over the whole level; second order takes two per step but the last."""
    network_calls: int
    """Batches of at most ``tile_batch`` patches through the network, the pass that fills the cache included; with cache
    "off" without those that compute context."""
    patches: int
    """Patches through the network in all of them."""
    flops: int
    """Products and attention of all patches."""
    cached_blocks: int
    """Blocks whose inputs are kept for the levels above."""
    cache_bytes: int
    """What that takes, fp32."""


def sampling_plan(config: HPDMConfig, options: SamplerOptions | None = None) -> list[LevelPlan]:
    """Tiles, calls, work and cached features per level of sampling one video with ``options``."""
    options = options or SamplerOptions()
    copies = _copies(options)
    chunk = max(1, options.tile_batch // copies)
    deep, off = config.fusion == "deep", options.cache == "off"
    tilings = [options.tiling(config, level) for level in range(config.levels)]
    ancestors = find_ancestors(tilings)
    per_features = [feature_flops(config, level) for level in range(config.levels - 1)] if deep else []
    plans = []
    for level, cover in enumerate(tilings):
        tiles, predictions = cover.tiles, options.level_solver(level).predictions
        keeps = deep and not off and level < config.levels - 1
        cached = sum(n > level + 1 for n in config.levels_per_block) if keeps else 0
        # Tiles of finished levels that go through the network for their features, per level: this one's once it is
        # finished, or for every batch of tiles those that it descends from.
        clean = [0] * config.levels
        if keeps:
            clean[level] = tiles
        elif deep and off:
            for batch in tile_sharing.batches(tiles, chunk):
                for below, needed in enumerate(lineage(ancestors, level, batch)):
                    clean[below] += predictions * len(needed)
        work = predictions * tiles * patch_flops(config, level) + sum(n * f for n, f in zip(clean, per_features))
        plans.append(
            LevelPlan(
                level=level,
                resolution=config.level_resolution(level),
                tiles=tiles,
                steps=options.level_steps(level),
                predictions=predictions,
                network_calls=(predictions + keeps) * math.ceil(tiles / chunk),
                patches=copies * (predictions * tiles + sum(clean)),
                flops=copies * work,
                cached_blocks=cached,
                cache_bytes=copies * tiles * cached * config.tokens * config.width * FP32,
            )
        )
    return plans


def patch_flops(config: HPDMConfig, level: int) -> int:
    """Products and attention of one patch of one level through the network while sampling, kernels on."""
    return _flops(config, lambda model: _call(model, level, 1))


def feature_flops(config: HPDMConfig, level: int) -> int:
    """The same of one clean patch on its way to be context for the levels above."""
    return _flops(config, lambda model: model.level_features(**_inputs(model, level, 1)))


def _flops(config: HPDMConfig, call: Callable[[HPDM], object]) -> int:
    with fake_fp32(), torch.no_grad():
        model = HPDM(config, kernels="torch")
        with Ledger() as ledger:
            call(model)
    return ledger.flops


def _copies(options: SamplerOptions) -> int:
    return 1 if options.guidance == 1.0 else 2


def _inputs(model: HPDM, level: int, batch: int) -> dict[str, Any]:
    """``batch`` patches of one level, with a single row of context, which all of them read."""
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
    given = {name: inputs[name][:, level] for name in ("x", "boxes", "t")}
    conditioning = {name: inputs[name] for name in ("labels", "text") if name in inputs}
    return given | conditioning | {"level": level, "context": context}


def _call(model: HPDM, level: int, batch: int) -> torch.Tensor:
    """The network on ``batch`` patches of one level."""
    latents = None
    if level == 0 and model.config.self_conditioning:  # carried from step to step there
        latents = model.latents.new_empty(batch, *model.latents.shape)
    return model.forward_level(**_inputs(model, level, batch), latents=latents)


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes of sampling, fp32, while the last level runs. Inputs of the command and the runtime are left out."""

    weights: int
    features: int
    """Features of finished levels on the model's device: all with cache "gpu", else a batch's rows (two with "cpu")."""
    host_features: int
    """With cache "cpu" all of them, in host memory."""
    videos: int
    """Finished levels, and thrice the last one: sample, its scaled copy, sums of the tiles; five in second order."""
    network: int
    """One network call at its peak, with its tiles."""

    @property
    def device_bytes(self) -> int:
        """What the model's device holds."""
        return self.weights + self.features + self.videos + self.network


def sampling_memory(config: HPDMConfig, options: SamplerOptions, videos: int = 1) -> SamplingMemory:
    """Predicts the memory of sampling ``videos`` at a time.

    ``weights + features + videos + network``, of which the tiles' number is in ``features`` alone::

        features = V sum_l T_l blocks_l N D        (cache "gpu"; V videos with their guidance copies)
        videos   = B C (sum_{l < L-1} F_l H_l W_l + 3 F H W)       (5 F H W in second order)
        network  = what one call on tile_batch patches allocates at most
    """
    copies = _copies(options)
    patches = (
        videos
        * copies
        * min(max(1, options.tile_batch // (videos * copies)), options.tiling(config, config.levels - 1).tiles)
    )
    with fake_fp32(), torch.no_grad():
        model = HPDM(config, kernels="torch")
        weights = sum(p.numel() for p in model.parameters()) * FP32
        with Ledger() as ledger:
            ledger.label(model.parameters(), "weights")
            _call(model, config.levels - 1, patches)
    at_peak = ledger.at_peak()
    # Tiles, the prediction and what is made of it, beside what the call itself holds of them.
    tile = patches * config.channels * math.prod(config.patch) * FP32
    plans = sampling_plan(config, replace(options, cache="gpu"))
    cached = videos * sum(plan.cache_bytes for plan in plans)
    # Rows of context of one batch, for the blocks that fuse: on every level below as many tiles as it has, none twice,
    # so never more than there are. Computed for the batch they serve the blocks that fuse into levels between, too.
    row = config.tokens * config.width * FP32
    fusing = [plans[-2].cached_blocks if options.cache == "cpu" else plan.cached_blocks for plan in plans[:-1]]
    batch = sum(min(patches, videos * copies * plan.tiles) * n * row for plan, n in zip(plans, fusing))
    features = {"gpu": cached, "cpu": min(cached, 2 * batch), "off": batch}[options.cache]
    per_level = [videos * config.channels * math.prod(plan.resolution) * FP32 for plan in plans]
    return SamplingMemory(
        weights=weights,
        features=features,
        host_features=cached if options.cache == "cpu" else 0,
        videos=sum(per_level[:-1]) + (5 if options.level_solver(config.levels - 1).second_order else 3) * per_level[-1],
        network=sum(n for name, n in at_peak.items() if name != "weights") + 2 * tile,
    )


def seconds_per_patch(model: HPDM) -> float:
    """Measured: the network on one patch of level 0, which all blocks serve, or on a few where that is quick."""
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
    """One line before a run: patches, steps, expected memory and time."""
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
