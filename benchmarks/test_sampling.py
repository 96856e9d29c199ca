"""Sampling a whole video, level by level: what caching the finished levels is worth.

The contenders differ in when the features of a tile's ancestors are computed: for every tile anew, by the whole network
(what denoising all levels of a patch jointly comes to) or by the blocks that are needed; for a batch of tiles, which
share ancestors (``--cache off``); once per step for all tiles; or once per level. The paper found 1.4x for its cache.
Beside the times stand the blocks that each runs (a block on one patch), the work that the cache is there to save.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from hpdm import HPDM, HPDMConfig, presets
from hpdm.patch import tile_sharing
from hpdm.patch.context_cache import lineage
from hpdm.patch.model import Context
from hpdm.patch.sampler import Sampler, SamplerOptions, _Run
from hpdm.planning.sampling_cost import LevelPlan, sampling_plan

ROUNDS = 2


class EveryTile(_Run):
    """Each tile's own chain of ancestors goes through the network: all blocks of them, or those that are needed."""

    whole = True

    def _recomputed(self, level, batch):
        if level == 0:
            return None
        features, boxes = {b: [] for b in self.model.fusing_blocks(1)}, []
        context = None
        for below in range(level):
            cover, tiles = self.tilings[below], self.ancestors[level][below][batch]
            clean = self._clean_tiles(below, cover.origins[tiles])
            inputs = self._inputs(below, clean, cover.boxes[tiles], 0.0, context)
            wanted = self.model.fusing_blocks(below + 1)
            stop = len(self.model.rin_blocks) if self.whole else wanted[-1]
            for b, found in self.model._run_level(*inputs, None, wanted, stop)[2].items():
                features[b].append(found)
            boxes.append(inputs[2])
            index = torch.arange(len(boxes[0]), device=self.device)[:, None].expand(-1, below + 1)
            context = Context({b: tuple(features[b]) for b in wanted}, None, tuple(boxes), index)
        return context


class EveryTileWhatIsNeeded(EveryTile):
    """Without the last block of every ancestor, whose output nobody reads."""

    whole = False


class OncePerStep(_Run):
    """Throws the features of the finished levels away before every step."""

    def _predict(self, level, x, *rest):
        self.cache.finished.clear()
        for below in range(level):
            self._keep_features(below)
        super()._predict(level, x, *rest)


def blocks(config: HPDMConfig, plan: list[LevelPlan], run: _Run) -> dict[str, int]:
    """Blocks that each contender runs, one patch each: block b serves the levels below ``levels_per_block[b]``.

    A clean patch needs one less: the last block's inputs are context, its output is not.
    """
    serving = [sum(n > p.level for n in config.levels_per_block) for p in plan]
    denoised = [p.predictions * p.tiles * n for p, n in zip(plan, serving)]
    clean = [p.tiles * (n - 1) for p, n in zip(plan, serving)]
    per_batch = 0
    for p in plan:
        for batch in tile_sharing.batches(p.tiles, run.chunk):
            needed = lineage(run.ancestors, p.level, batch)
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
    """Share of the time that fusing context takes, while nothing else is measured."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = profile.key_averages()
    fusing = sum(e.cpu_time_total for e in events if e.key.startswith("hpdm::fuse_context"))
    return fusing / sum(e.self_cpu_time_total for e in events)


@pytest.mark.parametrize(("overlap", "videos"), [("hw", 1), ("fhw", 4)])
def test_cached_levels(record, device, overlap, videos):
    config = presets.tiny() if device.type == "cpu" else presets.hpdm_s()
    torch.manual_seed(0)
    model = HPDM(config).to(device).eval().requires_grad_(False)
    seeds, labels = range(videos), torch.zeros(videos, dtype=torch.long)

    def sampler(cache: str, steps: int = 8, overlap: str = overlap) -> Sampler:
        return Sampler(model, SamplerOptions(steps=steps, overlap=overlap, cache=cache))

    cached, anew = sampler("gpu"), sampler("off")

    def start(kind: type[_Run], of: Sampler) -> _Run:
        return kind(of, seeds, labels, None, None, None, ())

    @torch.no_grad()
    def sample(kind: type[_Run], of: Sampler) -> list[torch.Tensor]:
        run = start(kind, of)
        for level in range(config.levels):
            run.sample(level)
        return run.videos

    calls = {
        "whole network on every tile's ancestors": lambda: sample(EveryTile, anew),
        "ancestors of every tile": lambda: sample(EveryTileWhatIsNeeded, anew),
        "ancestors once per batch (--cache off)": lambda: anew(seeds, labels),
        "ancestors once per step": lambda: sample(OncePerStep, cached),
        "hpdm, once per level": lambda: cached(seeds, labels),
    }
    for cache in ("gpu", "off"):  # what only a first call pays
        sampler(cache, steps=1, overlap="none")([0], labels[:1])
    timers = {name: harness.Timer(device) for name in calls}
    made: dict[str, torch.Tensor] = {}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            timers[name].sample(lambda name=name, call=call: made.update({name: call()[-1]}))
        for name, video in made.items():
            assert (video - made["hpdm, once per level"]).abs().max() < 1e-3, name
    share = share_in_context(calls["hpdm, once per level"]) if device.type == "cpu" else None
    plan = sampling_plan(config, cached.options)
    shape = f"{'tiny' if device.type == 'cpu' else 'HPDM-S'}, tiles {'/'.join(str(p.tiles) for p in plan)}, "
    shape += f"steps {'/'.join(str(p.steps) for p in plan)}, B={videos}"
    counts = blocks(config, plan, start(_Run, cached))
    most = max(counts.values())
    base = None
    for name, timer in timers.items():
        extra = {"blocks": counts[name], "blocks saved": most / counts[name]}
        row = record(
            "sampling a video", shape, name, "fwd", timer.seconds(), reference=base is None,
            arithmetic=harness.arithmetic_of(torch.float32), flops=videos * sum(p.flops for p in plan),
            extra=extra | ({"share in context": share} if name.startswith("hpdm") else {}),
        )  # fmt: skip
        base = base or row.median_s
        row.speedup_vs_reference = base / row.median_s if base and row.median_s else None
