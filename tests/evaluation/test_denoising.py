"""The denoising error by context: compared with the sampler's own way through the network, level after level."""

from dataclasses import replace

import pytest
import torch

from hpdm.commands.evaluate import EvaluateOptions, evaluate, report_lines
from hpdm.data.clips import VideoDataset
from hpdm.evaluation.denoising import denoising_table, evaluate_denoising
from hpdm.patch.boxes import at_border, extract_patches, sample_boxes
from hpdm.patch.context import Context
from hpdm.patch.objective import EVALUATED_AT_BORDERS, evaluation_error
from hpdm.patch.system import PatchDiffusion
from hpdm.process import add_noise, network_input
from hpdm.runs import Run
from tests.small import random_model, save_as_run, small_config


@pytest.fixture
def drawn(generator):
    """A model, videos, and what :func:`evaluation_error` draws for them from seed 7."""
    model = random_model(small_config(), scale=0.2)
    video = torch.randint(0, 256, (4, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(6, (4,), generator=generator)
    again = torch.Generator().manual_seed(7)
    boxes = sample_boxes(model.config, 4, again, borders=EVALUATED_AT_BORDERS)
    x = extract_patches(video, boxes, model.config)
    t = 0.25 + 0.5 * torch.rand(4, 3, generator=again)
    noise = torch.randn(x.shape, generator=again)
    return model, video, labels, boxes, x, t, noise


@torch.no_grad()
def errors_of(drawn, **context):
    model, video, labels = drawn[:3]
    return evaluation_error(model, video, labels, torch.Generator().manual_seed(7), (0.25, 0.75), **context)[0]


@torch.no_grad()
def errors_level_by_level(drawn, below):
    """Each level from the features of the finished ones, at time ``below``, as :mod:`hpdm.patch.sampler` goes."""
    model, _, labels, boxes, x, t, noise = drawn
    signal, batch = torch.tensor(model.config.signal_scales), len(x)
    times = torch.full_like(t, below)
    (noised, target), (finished, _) = (add_noise(x, noise, at, signal) for at in (t, times))
    features, errors = [], []
    for level in range(3):
        context = None
        if level:
            index = torch.arange(batch)[:, None].expand(-1, level)
            by_block = {b: tuple(f[b] for f in features) for b in model.fusing_blocks(level)}
            context = Context(by_block, None, tuple(boxes[:, k] for k in range(level)), index)
        inputs = (level, boxes[:, level])
        v = model.forward_level(network_input(noised, t, signal)[:, level], *inputs, t[:, level], context, labels)
        errors.append((v - target[:, level]).square().mean(dim=(1, 2, 3, 4)))
        clean = network_input(finished, times, signal)[:, level]
        features.append(model.level_features(clean, *inputs, times[:, level], context, labels))
    return torch.stack(errors, dim=1)


@pytest.mark.parametrize("below", [0.0, 0.15])
def test_clean_contexts_are_those_of_the_sampler(drawn, below):
    expected = errors_level_by_level(drawn, below)
    torch.testing.assert_close(errors_of(drawn, context_noise=below), expected, rtol=1e-4, atol=1e-5)
    # A level below 0 there is none, and the others depend on theirs.
    other = errors_of(drawn, context="same")
    torch.testing.assert_close(other[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5)
    assert not torch.isclose(other[:, 1:], expected[:, 1:], rtol=1e-4).any()


def test_same_contexts_are_one_pass_and_independent_ones_differ(drawn):
    model, _, labels, boxes, x, t, noise = drawn
    signal = torch.tensor(model.config.signal_scales)
    noised, target = add_noise(x, noise, t, signal)
    with torch.no_grad():
        v = model(network_input(noised, t, signal), boxes, t, labels)
    same = errors_of(drawn, context="same")
    torch.testing.assert_close(same, (v - target).square().mean(dim=(2, 3, 4, 5)))
    independent = errors_of(drawn, context="independent")
    assert torch.equal(independent[:, 0], errors_of(drawn)[:, 0])
    for other in (same, errors_of(drawn)):
        assert not torch.isclose(independent[:, 1:], other[:, 1:], rtol=1e-4).any()
    with pytest.raises(ValueError, match="context: got 'noisy', expected one of 'clean', 'same', 'independent'"):
        errors_of(drawn, context="noisy")


class Borders(PatchDiffusion):
    """Its error is 1 for patches of level 1 at the border and 0 for others."""

    def errors(self, model, batch, generator, *, times, context, context_noise):
        boxes = sample_boxes(model.config, len(batch["video"]), generator, borders=EVALUATED_AT_BORDERS)
        border = at_border(boxes, model.config)[:, 1]
        error = border.float()
        return {"level_1": error}, {"border": error[border], "interior": error[~border]}


def evaluated(folder, system, **options):
    model = random_model(small_config(classes=2), scale=0.2)
    dataset = VideoDataset(folder, frames=8, size=(32, 32), train=False)
    run = Run(model, model.config, dataset.class_names, {}, 1, system)
    return evaluate_denoising(run, dataset, **{"clips": 6, "bins": 2, "batch": 4, "seed": 3} | options)


def test_rows_of_some_patches_are_means_of_those_alone(clips):
    result = evaluated(clips, Borders())
    (everyone,), border, interior = result["error"], *result["parts"].values()
    assert border["patches"] + interior["patches"] == 12
    assert set(border["error"]) <= {1.0, None}
    assert set(interior["error"]) <= {0.0, None}
    assert sum(everyone) / 2 == pytest.approx(border["patches"] / 12)
    one = evaluated(clips, Borders(), clips=1, bins=1)
    assert one["error"] + [part["error"] for part in one["parts"].values()] in ([[1], [1], [None]], [[0], [None], [0]])
    assert denoising_table(one).count(" -") == 2  # the range of times and the mean


def test_borders_stand_beside_the_interior_of_every_level_that_has_one(clips):
    result = evaluated(clips, PatchDiffusion(), bins=1)
    assert result["losses"] == ["level_0", "level_1", "level_2"]
    assert list(result["parts"]) == [f"level_{level}_{part}" for level in (1, 2) for part in ("border", "interior")]
    assert (result["context"], result["context_noise"]) == ("clean", 0.0)
    for level in (1, 2):
        parts = [result["parts"][f"level_{level}_{part}"] for part in ("border", "interior")]
        assert sum(part["patches"] for part in parts) == 6
        mean = sum((part["error"][0] or 0) * part["patches"] for part in parts) / 6
        assert mean == pytest.approx(result["error"][level][0], rel=1e-5)


def test_the_command_takes_a_context(clips, tmp_path):
    run = save_as_run(random_model(small_config(classes=2), scale=0.2), tmp_path / "run", ["RedDisc", "GreenSquare"],
                      {"stride": 1, "short": "error"})  # fmt: skip
    options = EvaluateOptions(run, clips, clips=2, bins=1, batch=2)
    clean, same = evaluate(options), evaluate(replace(options, context="same"))
    assert clean["error"][0] == pytest.approx(same["error"][0], rel=1e-5)
    assert clean["error"][1] != pytest.approx(same["error"][1], rel=1e-4)
    assert "context same" in "\n".join(report_lines(replace(options, context="same"), same))
    for noise, context in ((1.5, "clean"), (0.1, "same")):
        with pytest.raises(ValueError, match=f"context_noise: got {noise}, expected 0 to 1, and 0 unless"):
            evaluated(clips, PatchDiffusion(), context=context, context_noise=noise)
