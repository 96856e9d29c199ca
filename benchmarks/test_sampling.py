"""Sampling a whole video, level by level: what caching the finished levels is worth.

The contenders differ in when the features of a tile's ancestors are computed: for every tile anew (what denoising all
levels of a patch jointly comes to), once per step for all tiles, or once per level. The paper found 1.4x for its cache.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness
from hpdm import HPDM, presets
from hpdm.sampler import Sampler, SamplerOptions, _Run
from hpdm.sampling_plan import sampling_plan

ROUNDS = 2


class OncePerStep(_Run):
    """Throws the features of the finished levels away before every step."""

    def _predict(self, level, x, *rest):
        self.cache.finished.clear()
        for below in range(level):
            self._keep_features(below)
        super()._predict(level, x, *rest)


def share_in_context(call: harness.Call) -> float:
    """Share of the time that fusing context takes, while nothing else is measured."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    events = profile.key_averages()
    fusing = sum(e.cpu_time_total for e in events if e.key.startswith("hpdm::fuse_context"))
    return fusing / sum(e.self_cpu_time_total for e in events)


@pytest.mark.parametrize("overlap", ["hw"])
def test_cached_levels(record, device, overlap):
    config = presets.tiny() if device.type == "cpu" else presets.hpdm_s()
    torch.manual_seed(0)
    model = HPDM(config).to(device).eval().requires_grad_(False)
    labels = torch.tensor([0])
    steps = 8

    def sampler(cache: str) -> Sampler:
        return Sampler(model, SamplerOptions(steps=steps, overlap=overlap, cache=cache, tile_batch=32))

    cached, anew = sampler("gpu"), sampler("off")

    @torch.no_grad()
    def once_per_step() -> list[torch.Tensor]:
        run = OncePerStep(cached, [0], labels, None, None, None, ())
        for level in range(config.levels):
            run.sample(level)
        return run.videos

    calls = {
        "ancestors of every tile": lambda: anew([0], labels),
        "ancestors once per step": once_per_step,
        "hpdm, once per level": lambda: cached([0], labels),
    }
    truth = cached([0], labels)[-1]
    timers = {name: harness.Timer(device) for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            if turn == 0:
                assert (call()[-1] - truth).abs().max() < 1e-3, name
            else:
                timers[name].sample(call)
    share = share_in_context(calls["hpdm, once per level"]) if device.type == "cpu" else None
    plan = sampling_plan(config, cached.options)
    shape = f"{'tiny' if device.type == 'cpu' else 'HPDM-S'}, tiles {'/'.join(str(p.tiles) for p in plan)}, "
    shape += f"steps {'/'.join(str(p.steps) for p in plan)}"
    base = None
    for name, timer in timers.items():
        row = record(
            "sampling a video", shape, name, "fwd", timer.seconds(), reference=base is None,
            arithmetic=harness.arithmetic_of(torch.float32), flops=sum(p.flops for p in plan),
            extra={"share in context": share} if name.startswith("hpdm") else {},
        )  # fmt: skip
        base = base or row.median_s
        row.speedup_vs_reference = base / row.median_s if base and row.median_s else None
