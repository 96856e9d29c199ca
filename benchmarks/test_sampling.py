"""Sampling a whole video, level by level: what caching the finished levels is worth.

The contenders differ in when the features of a tile's ancestors are computed: for every tile anew (what denoising all
levels of a patch jointly comes to), once per step for all tiles, or once per level. The paper found 1.4x for its cache.
Beside the times stand the blocks that each runs (a block on one patch), the work that the cache is there to save.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from hpdm import HPDM, HPDMConfig, presets
from hpdm.sampling.plan import LevelPlan, sampling_plan
from hpdm.sampling.sampler import Sampler, SamplerOptions, _Run

ROUNDS = 2


class OncePerStep(_Run):
    """Throws the features of the finished levels away before every step."""

    def _predict(self, level, x, *rest):
        self.cache.finished.clear()
        for below in range(level):
            self._keep_features(below)
        super()._predict(level, x, *rest)


def blocks(config: HPDMConfig, plan: list[LevelPlan]) -> dict[str, int]:
    """Blocks that each contender runs, one patch each: block b serves the levels below ``levels_per_block[b]``."""
    of_patch = [sum(n > p.level for n in config.levels_per_block) for p in plan]
    of_level = [p.tiles * n for p, n in zip(plan, of_patch)]
    top = len(plan) - 1
    return {
        "ancestors of every tile": sum(p.predictions * p.tiles * sum(of_patch[: p.level + 1]) for p in plan),
        "ancestors once per step": sum(p.predictions * sum(of_level[: p.level + 1]) for p in plan),
        "hpdm, once per level": sum((p.predictions + (p.level < top)) * n for p, n in zip(plan, of_level)),
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

    @torch.no_grad()
    def once_per_step() -> list[torch.Tensor]:
        run = OncePerStep(cached, seeds, labels, None, None, None, ())
        for level in range(config.levels):
            run.sample(level)
        return run.videos

    calls = {
        "ancestors of every tile": lambda: anew(seeds, labels),
        "ancestors once per step": once_per_step,
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
    counts = blocks(config, plan)
    base = None
    for name, timer in timers.items():
        extra = {"blocks": counts[name], "blocks saved": counts["ancestors of every tile"] / counts[name]}
        row = record(
            "sampling a video", shape, name, "fwd", timer.seconds(), reference=base is None,
            arithmetic=harness.arithmetic_of(torch.float32), flops=videos * sum(p.flops for p in plan),
            extra=extra | ({"share in context": share} if name.startswith("hpdm") else {}),
        )  # fmt: skip
        base = base or row.median_s
        row.speedup_vs_reference = base / row.median_s if base and row.median_s else None
