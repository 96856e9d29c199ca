"""The ablations of appendix D: sinusoidal coordinates (D.2) and blocks that share their weights (D.4)."""

import json
import math
from pathlib import Path

import pytest
import torch

from hpdm import HPDM, HPDMConfig, distributed, presets, runs, systems
from hpdm.commands.train import train
from hpdm.patch.base_model import start_from_base
from hpdm.patch.boxes import sample_boxes
from hpdm.patch.context import Context
from hpdm.patch.sampler import Sampler
from hpdm.patch.sampling_cost import patch_flops
from hpdm.patch.sinusoidal_fusion import SinusoidalFusion
from hpdm.planning.parameters import parameters_by_part
from hpdm.planning.training_cost import training_step
from hpdm.sampling import SamplerOptions
from hpdm.system import Architecture
from hpdm_kernels import reference
from tests.processes import run_ranks
from tests.small import change_config, random_model, save_as_run, small_config, train_options

PATCH = systems.get("patch")
ABLATIONS = [
    {"coordinate_embedding": "sinusoidal"},
    {"share_blocks": True},
    {"share_blocks": True, "coordinate_embedding": "sinusoidal", "detach_context": True},
]


def inputs(config, generator, batch=2):
    x = torch.randn(batch, config.levels, 3, *config.patch, generator=generator)
    t = torch.rand(batch, config.levels, generator=generator)
    return x, sample_boxes(config, batch, generator), t, torch.randint(config.classes, (batch,), generator=generator)


def test_sinusoids_take_the_place_of_the_coordinates_in_equation_9(generator):
    width, grid = 6, (3, 2, 5)
    fusion = SinusoidalFusion(width, backend="reference").double()
    torch.nn.init.normal_(fusion.bias)
    x, source = (torch.randn(2, 30, width, dtype=torch.float64, generator=generator) for _ in range(2))
    box = torch.tensor([[0.0, 0.25, 0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.5, 0.5, 0.5]])
    whole = torch.tensor([[0.0, 0, 0, 1, 1, 1]]).repeat(2, 1)
    context = reference.sample_context((source,), (whole,), box, (grid,), grid)
    rows = []
    for b in range(2):
        for i, j, k in ((i, j, k) for i in range(3) for j in range(2) for k in range(5)):
            at = [
                float(box[b, a] + box[b, 3 + a] * (n + 0.5) / size)
                for a, (n, size) in enumerate(zip((i, j, k), grid))
            ]  # fmt: skip
            angles = [math.pi * 2**octave * c for c in at for octave in range(7)]
            rows.append([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
    embedded = torch.tensor(rows, dtype=torch.float64).reshape(2, 30, 42)
    weight = torch.cat((fusion.weight, fusion.coordinate_weight), dim=1)
    expected = torch.cat((x, context, embedded), dim=2) @ weight.T + fusion.bias
    found = fusion(x, (source,), (whole,), box, (grid,), grid)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_parameters():
    def count(**changes):
        config = small_config(**changes)
        model = HPDM(config, "torch")
        assert sum(parameters_by_part(PATCH, config).values()) == sum(p.numel() for p in model.parameters())
        return sum(p.numel() for p in model.parameters())

    config, whole = small_config(), count()
    fusing = sum(n > 1 for n in config.levels_per_block)
    assert count(coordinate_embedding="sinusoidal") == whole + fusing * config.width * (6 * 7 - 3)
    first = sum(p.numel() for p in HPDM(config).blocks[0].parameters())  # which has no fusion
    assert count(share_blocks=True) == whole - (len(config.levels_per_block) - 1) * first


@pytest.mark.parametrize("changes", ABLATIONS)
def test_levels_one_by_one_give_what_they_give_together(changes, generator):
    config = small_config(**changes)
    model = random_model(config)
    x, boxes, t, labels = inputs(config, generator, batch=1)
    with torch.no_grad():
        joint = model(x, boxes, t, labels)
        torch.testing.assert_close(same_weights(model, "reference")(x, boxes, t, labels), joint, rtol=1e-4, atol=1e-5)
        features, context = {b: [] for b in range(6)}, None
        for level in range(3):
            arguments = x[:, level], level, boxes[:, level], t[:, level], context, labels
            torch.testing.assert_close(model.forward_level(*arguments), joint[:, level], rtol=1e-4, atol=1e-5)
            for b, f in model.level_features(*arguments).items():
                features[b].append(f)
            context = Context(
                {b: tuple(features[b]) for b in model.fusing_blocks(level + 1)},
                None,
                tuple(boxes[:, k] for k in range(level + 1)),
                torch.zeros(1, level + 1, dtype=torch.long),
            )


def same_weights(model, kernels):
    other = HPDM(model.config, kernels).eval()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("changes", ABLATIONS)
def test_cached_and_recomputed_context_agree(changes):
    model = random_model(small_config(**changes))
    videos = [
        Sampler(model, SamplerOptions(steps=2, overlap="h", cache=cache))([3], torch.tensor([1]))[-1]
        for cache in ("gpu", "off")
    ]
    torch.testing.assert_close(*videos, rtol=0, atol=2e-5)


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_gradients_are_the_same_when_activations_are_computed_again(recompute, generator):
    config = small_config(**ABLATIONS[2])
    batch = inputs(config, generator)
    gradients = []
    for how in ("none", recompute):
        model = random_model(config, recompute=how)
        model(*batch).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_every_block_calls_the_shared_weights(generator):
    config = small_config(share_blocks=True)
    model = random_model(config)
    calls = []
    model.blocks[0].read.register_forward_hook(lambda *_: calls.append(1))
    model(*inputs(config, generator))
    assert len(calls) == len(config.levels_per_block)
    assert [name for name, _ in model.blocks[3].named_parameters()] == ["fusion.weight", "fusion.bias"]


def test_old_configs_have_neither(tmp_path):
    model = random_model(small_config())
    run = save_as_run(model, tmp_path / "run")
    change_config(run, lambda about: [about["model"].pop(name) for name in ("coordinate_embedding", "share_blocks")])
    loaded = runs.load(run)
    assert loaded.config == model.config
    assert (loaded.config.coordinate_embedding, loaded.config.share_blocks) == ("raw", False)


def test_they_are_options_of_a_run_and_of_its_plan():
    architecture = Architecture(coordinate_embedding="sinusoidal", share_blocks=True)
    config = PATCH.configure(presets.tiny(), architecture)
    assert (config.coordinate_embedding, config.share_blocks) == ("sinusoidal", True)
    assert HPDMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    small, shared = small_config(), small_config(share_blocks=True)
    parameters = sum(p.numel() for p in HPDM(shared).parameters())
    assert training_step(PATCH, shared, kernels="torch").weights_bytes == 4 * parameters
    assert patch_flops(shared, 1) == patch_flops(small, 1)
    for wrong in ({"fusion": "shallow"}, {"coordinates": False}):
        with pytest.raises(ValueError, match="coordinate_embedding: got 'sinusoidal' with"):
            small_config(coordinate_embedding="sinusoidal", **wrong)
    with pytest.raises(ValueError, match="coordinate_embedding: got 'learned', expected one of"):
        small_config(coordinate_embedding="learned")


def test_new_fusions_with_sinusoids_start_as_the_identity(tmp_path, generator):
    config = small_config(coordinate_embedding="sinusoidal").without_adaptive_computation()
    base_config = config.with_pyramid(config.patch, config.patch).replace(coordinate_embedding="raw")
    base, model = random_model(base_config), random_model(config, seed=1)
    start_from_base(model, base, tmp_path)
    x, boxes, t, labels = inputs(config, generator)
    for level in range(3):
        alone = base(x[:, level : level + 1], boxes[:, :1], t[:, level : level + 1], labels)[:, 0]
        torch.testing.assert_close(model(x, boxes, t, labels)[:, level], alone)


def options(clips, out, **changes):
    values = {
        "steps": 2,
        "batch": 4,
        "micro_batch": 2,
        "optimizer": "lamb",
        "lr": 5e-3,
        "ema_decay": 0.9,
        "device": "cpu",
    }
    ablations = {"share_blocks": True, "coordinate_embedding": "sinusoidal"}
    return train_options(clips, out, **(values | ablations | changes))


def train_in_a_group(clips, out):
    with distributed.process_group(torch.device("cpu")):
        train(options(Path(clips), Path(out), parallel="fsdp"))


def test_shared_weights_are_trained_in_shards_as_in_one_process(clips, tmp_path):
    """A module that is called once per block gathers its shards for each call and sums the gradients of all."""
    train(options(clips, tmp_path / "alone"))
    run_ranks(train_in_a_group, 2, clips, tmp_path / "two")
    alone, two = ([json.loads(row) for row in (tmp_path / name / "log.jsonl").open()] for name in ("alone", "two"))
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in alone], rel=1e-4)
    expected, got = (dict(runs.load(tmp_path / name).model.named_parameters()) for name in ("alone", "two"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)
