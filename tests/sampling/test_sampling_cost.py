"""The predicted cost of sampling, against a real run."""

import pytest
import torch

from hpdm import HPDM, presets
from hpdm.patch.sampler import Sampler
from hpdm.patch.sampling_cost import duration, plan_line, sampling_memory, sampling_plan
from hpdm.planning.ledger import Ledger
from hpdm.sampling import SamplerOptions


def config(**changes):
    return presets.tiny().replace(
        patch=(4, 16, 16), width=32, latents=8, latent_width=32, head_width=16, conditioning_width=32, **changes
    )


GUIDED = {"guidance": 2.0}
NOISED = {"guidance": 2.0, "later_guidance": 1.0, "context_noise": 0.1}


@pytest.mark.parametrize(
    ("cache", "later", "guidance"),
    [
        ("gpu", "2m", {}), ("gpu", "2m", NOISED), ("gpu", "heun", GUIDED), ("gpu", "ddim", GUIDED),
        ("cpu", "ddim", {}), ("cpu", "2m", NOISED), ("off", "ddim", {}), ("off", "2m", GUIDED),
        ("gpu", "2m", {"consistency": 1.0}), ("off", "ddim", {"consistency": 0.5}),
    ],
)  # fmt: skip
def test_predicted_memory_is_that_of_a_run(cache, later, guidance):
    """Within 10 % of all storages that are alive at the peak of a real run."""
    model = HPDM(config(), "torch").eval().requires_grad_(False)
    steps = 8 if later == "heun" else 2  # two on the last level, or there is no second prediction
    options = SamplerOptions(steps=steps, overlap="w", tile_batch=16, cache=cache, later_solver=later, **guidance)
    sampler = Sampler(model, options)
    with Ledger() as ledger:
        ledger.label(model.parameters(), "weights")
        sampler([0, 1], torch.tensor([0, 1]))
    expected = sampling_memory(model.config, options, videos=2)
    # The test's device is the host, so their memory counts together.
    predicted = expected.device_bytes + expected.host_features
    assert predicted == pytest.approx(sum(ledger.at_peak().values()), rel=0.1)


def test_features_are_planned_where_they_are_kept():
    on_device, on_host, recomputed = (
        sampling_memory(config(), SamplerOptions(tile_batch=4, cache=cache)) for cache in ("gpu", "cpu", "off")
    )
    assert on_host.host_features == on_device.features > on_host.features > recomputed.features > 0
    assert on_device.host_features == recomputed.host_features == 0


def test_patches_are_those_of_a_run():
    """With cache "off", a batch of tiles also runs the tiles that it depends on, each once."""
    model = HPDM(config(), "torch").eval()
    seen = 0

    def counted(run):
        def call(x, *rest):
            nonlocal seen
            seen += x.shape[0]
            return run(x, *rest)

        return call

    model.forward_level, model.level_features = counted(model.forward_level), counted(model.level_features)
    patches = []
    for cache in ("gpu", "off"):
        options = SamplerOptions(steps=4, overlap="hw", tile_batch=16, cache=cache, guidance=2.0)
        seen = 0
        Sampler(model, options)([0], torch.tensor([0]))
        patches.append(sum(p.patches for p in sampling_plan(model.config, options)))
        assert patches[-1] == seen
    assert patches[0] < patches[1] < 2 * patches[0]


def test_line_before_a_run():
    model = HPDM(config(), "torch").eval()
    line = plan_line(model, SamplerOptions(steps=4, cache="cpu"), videos=3, at_a_time=2)
    patches = 3 * sum(p.patches for p in sampling_plan(config(), SamplerOptions(steps=4)))
    assert f"tiles per level 1/27/343, steps 4/2/2, {patches} patches" in line
    assert "GB of host memory" in line


@pytest.mark.parametrize(("seconds", "text"), [(8.04, "8 s"), (0.5, "0.5 s"), (720, "12 min"), (12000, "3 h 20 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
