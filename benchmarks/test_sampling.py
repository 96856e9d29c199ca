"""Sampling a whole video, level by level: the gain from caching the finished levels.

The contenders differ in when they compute the features of a tile's ancestors:

- for every tile, with the whole network (the cost of denoising all levels of a patch jointly);
- for every tile, with only the blocks that are needed;
- for every batch of tiles, which share ancestors (``--cache off``);
- once per step for all tiles;
- once per level.

The paper reports a speed-up of 1.4x for its cache. The tables also show how many blocks each contender runs (a block
on one patch), which is the work that the cache saves.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import harness
from hpdm import HPDM, HPDMConfig, presets
from hpdm.patch.context import Context
from hpdm.patch.finished_levels import Contexts, cached, recomputed
from hpdm.patch.sampler import Sampler
from hpdm.patch.sampling_cost import LevelPlan, sampling_plan
from hpdm.patch.tile_network import tiles_per_call
from hpdm.patch.tile_sharing import batches
from hpdm.patch.tiling import find_ancestors, lineage
from hpdm.sampling import SamplerOptions

ROUNDS = 2
# (overlap, videos, products): the paper's model on CUDA, where its fp32 products take one TF32 pass, else ``tiny``.
ON_CUDA, ON_CPU = (("hw", 1, "tf32"), ("fhw", 1, "tf32")), (("hw", 1, "ieee"), ("fhw", 4, "ieee"))
CASES = ON_CUDA if torch.cuda.is_available() else ON_CPU
# Largest difference between the contenders' videos in [-1, 1]: they batch tiles differently.
TOLERANCE = {"ieee": 1e-3, "tf32": 5e-2}


def every_tile(levels, level, batches, copies, whole):
    """Runs the network on each tile's chain of ancestors, separately for every tile.

    ``whole``: runs all blocks; else skips the last block of every ancestor, whose output is not needed.
    """
    network = levels.network
    model = network.model
    for batch in batches:
        features, boxes = {b: [] for b in model.fusing_blocks(1)}, []
        context = None
        for below in range(level):
            tiles = levels.ancestors[level][below][batch]
            clean, tile_boxes = levels.context_tiles(below, tiles), levels.tilings[below].boxes[tiles]
            x, _, box, t, _, *conditions = network._inputs(below, clean, tile_boxes, 0.0, context, copies)
            blocks = model.fusing_blocks(below + 1)
            conditioning = model._condition_level(x, below, t, *conditions)
            stop = None if whole else blocks[-1]
            for b, feature in model._run_level(x, below, box, conditioning, context, None, blocks, stop)[2].items():
                features[b].append(feature)
            boxes.append(box)
            index = torch.arange(len(box), device=network.device)[:, None].expand(-1, below + 1)
            context = Context({b: tuple(features[b]) for b in blocks}, None, tuple(boxes), index)
        yield context


def once_per_step(levels, level, batches, copies):
    """Discards the features of the finished levels before every step and recomputes them."""
    levels.cache.finished.clear()
    for below in range(level):
        levels.keep_features(below)
    yield from cached(levels, level, batches, copies)


def blocks(config: HPDMConfig, plan: list[LevelPlan], sampler: Sampler, videos: int) -> dict[str, int]:
    """Number of blocks on one patch that each contender runs; block b runs on levels below ``levels_per_block[b]``.

    A clean patch needs one block less: the inputs of the last block are context, its output is not.
    """
    serving = [sum(n > p.level for n in config.levels_per_block) for p in plan]
    denoised = [p.predictions * p.tiles * n for p, n in zip(plan, serving)]
    clean = [p.tiles * (n - 1) for p, n in zip(plan, serving)]
    ancestors = find_ancestors(sampler.tilings)
    per_batch = 0
    for p in plan:
        for batch in batches(p.tiles, tiles_per_call(sampler.options, videos, 1)):
            needed = lineage(ancestors, p.level, batch)
            per_batch += p.predictions * sum(len(tiles) * (n - 1) for tiles, n in zip(needed, serving))
    tiles = [p.predictions * p.tiles for p in plan]
    chains = [sum(serving[: p.level]) for p in plan]  # blocks of a tile's chain of ancestors
    return {
        "whole network on every tile's ancestors": sum(denoised) + sum(n * chain for n, chain in zip(tiles, chains)),
        "ancestors of every tile": sum(denoised)
        + sum(n * (chain - level) for level, (n, chain) in enumerate(zip(tiles, chains))),
        "ancestors once per batch (--cache off)": sum(denoised) + per_batch,
        "ancestors once per step": sum(denoised) + sum(p.predictions * sum(clean[: p.level]) for p in plan),
        "hpdm, once per level": sum(denoised) + sum(clean[:-1]),
    }


def share_in_context(call: harness.Call) -> float:
    """Share of the CPU time of ``call`` that context fusion takes, from a separate profiled call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = profile.key_averages()
    fusing = sum(e.cpu_time_total for e in events if e.key.startswith("hpdm::fuse_context"))
    return fusing / sum(e.self_cpu_time_total for e in events)


@pytest.mark.parametrize(("overlap", "videos", "products"), CASES)
def test_cached_levels(record, device, overlap, videos, products):
    config = presets.tiny() if device.type == "cpu" else presets.hpdm_s()
    torch.manual_seed(0)
    model = HPDM(config).to(device).eval().requires_grad_(False)
    seeds, labels = range(videos), torch.zeros(videos, dtype=torch.long)

    def sampler(cache: str, contexts: Contexts | None = None, steps: int = 8, overlap: str = overlap) -> Sampler:
        sampler = Sampler(model, SamplerOptions(steps=steps, overlap=overlap, cache=cache))
        sampler.contexts = contexts or sampler.contexts
        return sampler

    samplers = {
        "whole network on every tile's ancestors": sampler("off", partial(every_tile, whole=True)),
        "ancestors of every tile": sampler("off", partial(every_tile, whole=False)),
        "ancestors once per batch (--cache off)": sampler("off", recomputed),
        "ancestors once per step": sampler("gpu", once_per_step),
        "hpdm, once per level": sampler("gpu", cached),
    }
    calls = {name: lambda sampler=sampler: sampler(seeds, labels) for name, sampler in samplers.items()}
    timers = {name: harness.Timer(device) for name in calls}
    sampled: dict[str, torch.Tensor] = {}
    with harness.products_in(products):
        for cache in ("gpu", "off"):  # warm-up
            sampler(cache, steps=1, overlap="none")([0], labels[:1])
        for _ in range(ROUNDS):
            for name, call in calls.items():
                timers[name].sample(lambda name=name, call=call: sampled.update({name: call()[-1]}))
            for name, video in sampled.items():
                assert (video - sampled["hpdm, once per level"]).abs().max() < TOLERANCE[products], name
        share = share_in_context(calls["hpdm, once per level"]) if device.type == "cpu" else None
    ours = samplers["hpdm, once per level"]
    plan = sampling_plan(config, ours.options)
    shape = f"{'tiny' if device.type == 'cpu' else 'HPDM-S'}, tiles {'/'.join(str(p.tiles) for p in plan)}, "
    shape += f"steps {'/'.join(str(p.steps) for p in plan)}, B={videos}"
    counts = blocks(config, plan, ours, videos)
    most = max(counts.values())
    base = None
    for name, timer in timers.items():
        extra = {"blocks": counts[name], "blocks saved": most / counts[name]}
        row = record(
            "sampling a video", shape, name, "fwd", timer.seconds(), reference=base is None,
            arithmetic=products, flops=videos * sum(p.flops for p in plan),
            extra=extra | ({"share in context": share} if name.startswith("hpdm") else {}),
        )  # fmt: skip
        base = base or row.median_s
        row.speedup_vs_reference = base / row.median_s if base and row.median_s else None
