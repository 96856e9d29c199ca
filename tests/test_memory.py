"""The predictions of ``hpdm plan`` against real steps, counted parameters and closed forms."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hpdm import presets
from hpdm.memory import PlanCommand, parameters_by_part, sampling_plan, table1_config, training_step
from hpdm.model import HPDM
from hpdm.sampler import Sampler, SamplerOptions

SMALL = presets.tiny().replace(width=128, latent_width=64, latents=48)


def real_step(kernels: str, batch: int):
    model = HPDM(SMALL, kernels=kernels)
    x = torch.randn(batch, SMALL.levels, SMALL.channels, *SMALL.patch)
    boxes = torch.zeros(batch, SMALL.levels, 6)
    boxes[..., 3:] = torch.tensor([SMALL.level_scale(n) for n in range(SMALL.levels)])
    t, labels = torch.rand(batch, SMALL.levels), torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        (model(x, boxes, t, labels) - x).square().mean().backward()

    return model, step


def test_memory_is_that_of_a_real_step() -> None:
    """The allocator's own account of a real step, which the prediction knows nothing of."""
    model, step = real_step("reference", 4)
    step()
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    # The prediction counts the inputs and the target, the real step finds them there already.
    inputs = 2 * 4 * 4 * SMALL.levels * SMALL.channels * 4 * 16 * 16
    assert training_step(SMALL, 4, "reference").activation_bytes - inputs == pytest.approx(peak, rel=0.05)


def test_flops_are_those_of_a_real_step() -> None:
    _, step = real_step("reference", 2)
    with FlopCounterMode(display=False) as counter:
        step()
    assert training_step(SMALL, 2, "reference").flops == counter.get_total_flops()


def test_activations_grow_with_the_batch_and_shrink_with_the_kernels() -> None:
    one, two = (training_step(presets.tiny(), batch, "reference") for batch in (1, 2))
    assert one.static_bytes == two.static_bytes
    assert 1.5 < two.activation_bytes / one.activation_bytes <= 2.0
    assert two.flops == pytest.approx(2 * one.flops, rel=0.05)
    assert training_step(presets.tiny(), 2, "torch").activation_bytes < two.activation_bytes


@pytest.mark.parametrize("name", presets.PUBLISHED_PARAMETERS)
def test_parameters_by_part(name: str) -> None:
    counts = parameters_by_part(presets.get(name))
    assert all(count > 0 for count in counts.values())
    assert sum(counts.values()) == pytest.approx(presets.PUBLISHED_PARAMETERS[name], rel=0.01)


def test_sampling_plan_of_the_paper() -> None:
    """3,375 tiles on the last level of HPDM-T2V (2R/r - 1 per axis); each level keeps what the ones above fuse."""
    plans = sampling_plan(presets.hpdm_t2v())
    assert [p.tiles for p in plans] == [1, 27, 343, 3375]
    assert [p.steps for p in plans] == [128, 64, 32, 16]
    assert [p.cached_blocks for p in plans] == [5, 3, 1, 0]
    assert plans[1].cache_bytes == 27 * 3 * 8 * 12 * 16 * 1024 * 4
    guided = sampling_plan(presets.hpdm_t2v(), SamplerOptions(guidance=3.0))
    assert [g.patches for g in guided] == [2 * p.patches for p in plans]


def test_network_calls_are_the_samplers() -> None:
    """The plan against what the sampler reports while it runs, and the patches its model is given."""
    config = presets.tiny().replace(width=32, latent_width=32, latents=4, conditioning="none")
    options = SamplerOptions(steps=4, overlap="hw", tile_batch=5)
    model = HPDM(config, kernels="torch").eval()
    calls = dict.fromkeys(range(config.levels), 0)
    patches = dict(calls)
    forward = model.forward_level

    def counted(x, level, *rest):
        calls[level] += 1
        patches[level] += x.shape[0]
        return forward(x, level, *rest)

    model.forward_level = counted
    Sampler(model, options)([0])
    plans = sampling_plan(config, options)
    assert calls == {p.level: p.network_calls for p in plans}
    assert patches == {p.level: p.patches for p in plans}


@pytest.mark.parametrize(
    ("patch", "resolution", "adaptive", "load"),
    [
        (None, (64, 256, 256), False, (1,) * 6),
        ((16, 64, 64), (64, 256, 256), True, (1, 1, 2, 2, 3, 3)),
        ((16, 64, 64), (64, 512, 512), True, (1, 2, 2, 3, 3, 4)),
        ((32, 128, 128), (64, 512, 512), False, (3,) * 6),
    ],
)
def test_rows_of_table_1(patch, resolution, adaptive, load) -> None:
    config = table1_config(presets.hpdm_m(), patch, resolution, adaptive)
    assert config.levels_per_block == load
    assert config.resolution[1:] == resolution[1:]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert PlanCommand(preset="tiny", batch=2, kernels="triton", json=file).run() == 0
    result = json.loads(file.read_text())
    assert [cost["batch"] for cost in result["training"]] == [2]
    assert sum(result["parameters"].values()) == sum(p.numel() for p in HPDM(presets.tiny()).parameters())
    assert "not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"preset": "hpdm_xl"}, "preset"),
        ({"preset": "tiny", "batch": 0}, "batch"),
        ({"preset": "tiny", "resolution": (5, 64, 64)}, "resolution"),
        ({"preset": "tiny", "table1": True, "batch": 2}, "table1"),
    ],
)
def test_bad_options_are_named(arguments, named) -> None:
    with pytest.raises(ValueError, match=f"^{named}:"):
        PlanCommand(**arguments).run()
