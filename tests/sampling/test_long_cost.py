"""The predicted cost of long videos, against real runs: work by the patch, memory by the byte, neither with length."""

import itertools

import pytest
import torch

from hpdm import HPDM
from hpdm.long_video import LongOptions
from hpdm.patch.long_cost import long_plan, long_plan_line
from hpdm.patch.long_sampler import LongSampler
from hpdm.planning.ledger import Ledger
from hpdm.sampling import SamplerOptions
from tests.small import random_model, small_config

CONFIG = small_config(patch=(4, 8, 8), tokenizer=(1, 2, 2), known_frames=True, spacing=3, memory=True)
SMALLER = CONFIG.replace(levels=2, levels_per_block=(1, 2))
OPTIONS = [
    SamplerOptions(steps=4, solver="2m", overlap="fhw", tile_batch=16),
    SamplerOptions(
        steps=4, solver="2m", overlap="hw", tile_batch=16, guidance=2.0, later_guidance=1.0, consistency=1.0
    ),
    SamplerOptions(steps=4, solver="ddim", tile_batch=64, guidance=2.0, frame_guidance=0.2),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "guided", "by frames"])
@pytest.mark.parametrize(
    "long",
    [LongOptions(known=1), LongOptions(), LongOptions(known=3, remember=False), LongOptions("joint", together=2)],
    ids=str,
)
def test_patches_are_those_of_a_run(options, long):
    model, seen = random_model(CONFIG), 0

    def counted(run):
        def call(x, *rest, **named):
            nonlocal seen
            seen += x.shape[0]
            return run(x, *rest, **named)

        return call

    for name in ("forward_level", "forward_level_with_latents", "level_features"):
        setattr(model, name, counted(getattr(model, name)))
    frames = 16 + 3 * (4 - (long.known or 2)) * 4
    for _ in LongSampler(model, options, long).segments([0], frames, torch.tensor([1])):
        pass
    plan = long_plan(CONFIG, options, long, frames)
    assert plan.windows == 4
    exact = long.scheme != "joint" or not options.frame_guidance  # whose first group has nothing to be guided by
    assert plan.patches == pytest.approx(seen, rel=0 if exact else 0.01)
    assert plan.flops > 0


@pytest.mark.parametrize("scheme", ["rolling", "hierarchical"])
def test_the_mean_work_of_other_schemes_is_that_of_a_long_run(scheme):
    model, seen = random_model(CONFIG), []
    run = model.forward_level

    def counted(x, level, *rest, **named):
        seen.append(x.shape[0] * (level == 0))
        return run(x, level, *rest, **named)

    model.forward_level = counted
    options, long = SamplerOptions(steps=8, solver="2m"), LongOptions(scheme)
    sampler = LongSampler(model, options, long)
    windows = 9
    frames = [w.start + 4 for w in itertools.islice(sampler.windows.all(), windows)][-1] * 4
    by_window = []
    for _ in sampler.segments([0], frames):
        by_window.append(sum(seen) - sum(by_window))
    plan = long_plan(CONFIG, options, long, frames)
    predicted = plan.next[0].patches - plan.next[0].features
    assert sum(by_window[1:]) / (windows - 1) == pytest.approx(predicted, rel=0.15)


def peak(windows, long=LongOptions(), options=OPTIONS[0], config=CONFIG):  # noqa: B008, frozen
    """Bytes of all storages that are alive at the peak of a run of so many windows."""
    model = random_model(config).requires_grad_(False)
    sampler = LongSampler(model, options, long)
    frames = [w.start + 4 for w in itertools.islice(sampler.windows.all(), windows)][-1] * sampler.windows.scale
    with Ledger() as ledger:
        ledger.label(model.parameters(), "weights")
        for _ in sampler.segments([0, 1], frames, torch.tensor([1, 2])):
            pass
    return sum(ledger.at_peak().values())


@pytest.mark.parametrize("scheme", ["autoregressive", "joint", "rolling", "hierarchical"])
def test_memory_does_not_grow_with_the_length(scheme):
    options = SamplerOptions(steps=2, solver="2m", tile_batch=64)
    few, many = (peak(windows, LongOptions(scheme), options, SMALLER) for windows in (8, 16))
    assert many <= few * 1.005


@pytest.mark.parametrize("options", OPTIONS[:2], ids=["plain", "guided"])
def test_predicted_memory_is_that_of_a_run(options):
    predicted = long_plan(SMALLER, options, LongOptions(), 60, videos=2).memory_bytes
    assert predicted == pytest.approx(peak(3, options=options, config=SMALLER), rel=0.12)


def test_line_before_a_run():
    model = HPDM(CONFIG, "torch").eval()
    line = long_plan_line(model, OPTIONS[0], LongOptions(), 100, 3, 2, 1)
    plan = long_plan(CONFIG, OPTIONS[0], LongOptions(), 100)
    assert "3 video(s) of 100 frames in 12 window(s), autoregressive, 2 known frame(s) of level 0, steps 4/2/2" in line
    assert f"{3 * plan.patches} patches" in line
    assert "GB whatever the length" in line
