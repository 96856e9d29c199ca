"""What training samples show: times, finished lower levels, weights, cuts and flips; and the options of a run."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import tyro

from hpdm import process
from hpdm.commands.train import _check_cuts, train
from hpdm.objective import Objective, draw_mirrored, draw_times, loss_weight, mirror
from hpdm.patch.draws import draw, finish_lower_levels
from hpdm.patch.objective import denoising_error
from hpdm.recipe import Recipe
from hpdm.training.options import TrainOptions, train_options
from tests.small import change_config, random_model, small_config
from tests.small import train_options as options


def cumulative(t, times):
    """The distribution function of diffusion times."""
    return t if times == "uniform" else torch.special.ndtr(torch.logit(t.double()))


def assert_distributed(t, times):
    """Kolmogorov's distance of the values from their distribution; 2.5 / sqrt(n) is passed once in 140,000 times."""
    share = cumulative(t.double().flatten(), times).sort().values
    steps = torch.arange(1, len(share) + 1) / len(share)
    assert (share - steps).abs().max() < 2.5 / math.sqrt(len(share)) + 1 / len(share)


@pytest.mark.parametrize("times", ["uniform", "logit-normal"])
@pytest.mark.parametrize("batch", [1, 5])
def test_low_discrepancy_spreads_a_batch_and_keeps_each_time_as_it_was(times, batch, generator):
    objective = Objective(times=times, low_discrepancy=True)
    drawn = torch.stack([draw_times((batch, 3), (0.0, 1.0), generator, objective) for _ in range(3000)])  # [n, B, L]
    share = cumulative(drawn.double(), times) * batch
    # The i-th smallest is the quantile (i + shift) / B, with one shift for all samples of a level.
    shift = share.sort(dim=1).values - torch.arange(batch)[:, None]
    assert (shift.amax(1) - shift.amin(1)).max() < 1e-3
    assert shift.min() > -1e-3
    assert shift.max() < 1 + 1e-3
    for sample in (0, batch - 1):
        for level in range(3):
            assert_distributed(drawn[:, sample, level], times)
    if batch > 1:  # levels do not share their order
        rank = drawn.argsort(dim=1)
        agree = (rank[:, :, 0] == rank[:, :, 1]).double().mean()
        assert agree == pytest.approx(1 / batch, abs=6 * 0.5 / math.sqrt(3000))


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_times_stay_in_their_range(low_discrepancy, generator):
    t = draw_times((400, 2), (0.25, 0.5), generator, Objective(low_discrepancy=low_discrepancy))
    assert t.min() >= 0.25
    assert t.max() <= 0.5
    assert_distributed((t - 0.25) * 4, "uniform")


@pytest.mark.parametrize("signal", [1.0, 0.7, 0.343])
def test_min_snr_weights_the_error_of_the_clean_video(signal, generator):
    x, noise, wrong = torch.randn(3, 200, 1, 4, generator=generator).double()
    t, b = torch.rand(200, 1, generator=generator).double().clamp(1e-3, 0.999), torch.tensor([signal]).double()
    noised, v = process.add_noise(x, noise, t, b)
    predicted = v + 0.1 * wrong
    clean = process.denoise(noised[:, 0], predicted[:, 0], t[:, 0]) / signal
    g = process.gamma(t)
    of_clean = (signal**2 * g / (1 - g)).clamp(max=5)[:, 0] * (clean - x[:, 0]).square().mean(1)
    of_v = (loss_weight("min-snr", t, b) * (predicted - v).square().mean(2))[:, 0]
    torch.testing.assert_close(of_v, of_clean)
    assert torch.equal(loss_weight("none", t, b), torch.ones_like(t))


@pytest.mark.parametrize(("share", "levels"), [(0.5, 3), (0.9, 4), (0.3, 2)])
def test_finished_lower_levels_are_shown_as_sampling_shows_them(share, levels, generator):
    rows = 40_000
    objective = Objective(clean_context=share, context_t_max=0.2)
    before = draw_times((rows, levels), (0.0, 1.0), generator)
    t, weight = finish_lower_levels(before, levels, objective, generator)
    finished = weight == 0
    below = finished.sum(1)  # levels 0 .. k-1 are finished
    assert torch.equal(finished, torch.arange(levels) < below[:, None])
    assert torch.equal(t[~finished], before[~finished])
    near = 6 * 0.5 / math.sqrt(rows)
    for k in range(1, levels):
        rows_of_k = below == k
        assert rows_of_k.double().mean() == pytest.approx(share / (levels - 1), abs=near)
        small = t[rows_of_k][:, :k]
        assert torch.equal(small, small[:, :1].expand_as(small)), "all finished levels are at one time"
        small = small[:, 0]
        assert (small == 0).double().mean() == pytest.approx(0.5, abs=6 * 0.5 / math.sqrt(len(small)))
        assert_distributed(small[small > 0] / 0.2, "uniform")
        # The level above is trained as sampling meets it, at all of its times.
        assert_distributed(t[rows_of_k, k], "uniform")
    # Each level counts as much as without, at the same times.
    assert weight.double().mean(0).tolist() == pytest.approx([1.0] * levels, abs=0.1)
    for level in range(levels):
        assert_distributed(t[~finished[:, level], level], "uniform")


def test_finished_levels_are_not_trained_and_a_single_level_has_none(generator):
    model, base = random_model(small_config()), random_model(small_config(levels=1, levels_per_block=(1, 1)))
    video = torch.randint(0, 256, (8, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    objective = Objective(clean_context=0.99)
    errors = denoising_error(model, video, None, draw(model.config, 8, generator, objective=objective))
    assert (errors[:, 0] == 0).any()
    assert (errors[:, 2] > 0).all()
    small, seed = video[:, :, :2, :8, :8].contiguous(), 5
    of_base = [
        denoising_error(base, small, None, draw(base.config, 8, torch.Generator().manual_seed(seed), objective=o))
        for o in (objective, None)
    ]
    assert torch.equal(*of_base)


def test_the_lowest_levels_alone_are_predicted_as_among_all(generator):
    model = random_model(small_config())
    x = torch.randn(2, 3, 3, 2, 8, 8, generator=generator)
    boxes = torch.zeros(2, 3, 6)
    boxes[..., 3:] = torch.tensor([1.0, 0.5, 0.25])[:, None]
    t = torch.rand(2, 3, generator=generator)
    whole = model(x, boxes, t)
    for n in (1, 2):
        torch.testing.assert_close(model(x[:, :n], boxes[:, :n], t[:, :n]), whole[:, :n], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 4"):
        model(torch.cat((x, x[:, :1]), dim=1), boxes, t)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 0"):
        model(x[:, :0], boxes, t)


def test_cuts_leave_out_the_highest_levels_and_expect_the_same_loss(generator):
    """With a network that predicts v = 0 the expected error is that of the target, whatever is left out."""
    model = random_model(small_config(levels=4, levels_per_block=(1, 4)), scale=0.0)
    video = torch.full((2, 3, 16, 64, 64), 128, dtype=torch.uint8)
    levels, total, calls = [], torch.zeros(4), 120

    def network(x, *_):
        levels.append(x.shape[1])
        return torch.zeros_like(x)

    for _ in range(calls):
        draws = draw(model.config, 2, generator, objective=Objective(cuts=True))
        error = denoising_error(model, video, None, draws, network=network)
        assert error.shape == (2, 4)
        assert (error[:, levels[-1] :] == 0).all()
        total += error.mean(0) / calls
    assert set(levels) == {2, 3, 4}
    # A gray video has v = sqrt(g) noise, and the mean of g over uniform times is 1/2. Level 3 is trained in a third of
    # the calls, with three times the weight: its standard error is sqrt((9 / 3) 3 / 8 / calls + ...), below 0.11.
    assert total.tolist() == pytest.approx([0.5] * 4, abs=5 * 0.11)
    assert total[:2].tolist() == pytest.approx([0.5] * 2, abs=0.2)


def test_weights_make_up_for_levels_that_are_cut(generator):
    config = small_config(levels=4, levels_per_block=(1, 4))
    objective, total, calls = Objective(cuts=True, clean_context=0.5), torch.zeros(4), 4000
    for _ in range(calls):
        weight = draw(config, 1, generator, objective=objective).weight[0]
        total[: len(weight)] += weight / calls
    # Level 3 is drawn in a third of the calls and has the weight 3 then, so its standard error is sqrt(2 / 4000).
    assert total.tolist() == pytest.approx([1.0] * 4, abs=5 * (2 / calls) ** 0.5)


def test_every_weight_takes_part_in_a_cut_step(generator):
    """DDP and FSDP wait for the gradients of all parameters."""
    model = random_model(small_config(levels_per_block=(1, 2, 3)))
    video = torch.randint(0, 256, (1, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    levels = []

    def network(x, *arguments, **named):
        levels.append(x.shape[1])
        return model(x, *arguments, **named)

    while 2 not in levels:
        model.zero_grad(set_to_none=True)
        draws = draw(model.config, 1, generator, objective=Objective(cuts=True))
        labels = torch.zeros(1, dtype=torch.long)
        denoising_error(model, video, labels, draws, network=network).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_cuts_and_sharded_weights_exclude_each_other(monkeypatch):
    given = train_options(data="x", out="y", cuts=True)
    sharded, replicated = Recipe(parallel="fsdp"), Recipe(parallel="ddp")
    _check_cuts(given, sharded)
    monkeypatch.setattr("hpdm.distributed.world_size", lambda: 2)
    _check_cuts(given, replicated)
    _check_cuts(train_options(data="x", out="y"), sharded)
    with pytest.raises(ValueError, match="cuts: got true with parallel='fsdp' on several processes"):
        _check_cuts(given, sharded)


def test_half_of_the_clips_are_mirrored(generator):
    video = torch.randint(0, 256, (400, 3, 1, 2, 5), dtype=torch.uint8, generator=generator)
    seen = mirror(video, draw_mirrored(400, generator))
    same, mirrored = ((seen == of).flatten(1).all(1) for of in (video, video.flip(4)))
    assert (same | mirrored).all()
    assert mirrored.double().mean() == pytest.approx(0.5, abs=6 * 0.5 / 20)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clean_context": 1.0}, r"clean_context: got 1.0, expected a share in \[0, 1\)"),
        ({"clean_context": math.nan}, "clean_context: got nan"),
        ({"context_t_max": 1.5}, r"context_t_max: got 1.5, expected a time in \[0, 1\]"),
        ({"times": "normal"}, "times: got 'normal', expected one of 'uniform', 'logit-normal'"),
        ({"weighting": "snr"}, "weighting: got 'snr', expected one of 'none', 'min-snr'"),
        ({"boxes": "middle"}, "boxes: got 'middle', expected one of 'uniform', 'nested'"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Objective(**values)
    with pytest.raises(ValueError, match=message):
        train_options(data="x", out="y", **values)


def test_the_options_of_a_run_are_flat():
    flat = {"times": "logit-normal", "boxes": "nested", "flip": True, "clean_context": 0.25}
    given = train_options(data="x", out=Path("y"), **flat)
    assert given.objective == Objective(**flat)
    assert flat.items() <= given.as_json(Recipe()).items()
    arguments = ["--data", "x", "--out", "y", "--times", "logit-normal", "--boxes", "nested", "--flip"]
    typed = tyro.cli(TrainOptions, args=[*arguments, "--clean-context", "0.25"])
    assert typed == given


def test_a_run_trains_with_all_of_it_and_keeps_its_boxes_when_it_is_resumed(clips, tmp_path):
    everything = {
        "low_discrepancy": True, "weighting": "min-snr", "clean_context": 0.5, "flip": True, "cuts": True, "steps": 2,
        "save_every": 1,
    }  # fmt: skip
    run = tmp_path / "run"
    train(options(clips, run, **everything))
    kept = json.loads((run / "config.json").read_text())["training"]
    assert {name: kept[name] for name in everything} == everything
    assert (kept["boxes"], kept["times"], kept["context_t_max"]) == ("uniform", "uniform", 0.2)
    train(options(clips, tmp_path / "default", steps=1))
    assert json.loads((tmp_path / "default" / "config.json").read_text())["training"]["clean_context"] == 0.25
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss_level_2"]) for row in rows)
    train(options(clips, run, **everything))  # finished already
    with pytest.raises(ValueError, match="boxes: uniform -> nested"):
        train(options(clips, run, boxes="nested", **everything))
    with pytest.raises(ValueError, match=r"clean_context: 0.5 -> 0.25"):
        train(options(clips, run, **everything | {"clean_context": 0.25}))


def test_a_run_from_before_the_options_goes_on_with_nested_boxes(clips, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(options(clips, whole, boxes="nested", clean_context=0.0, steps=2, save_every=1))
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    new = ("boxes", "low_discrepancy", "weighting", "clean_context", "context_t_max", "flip", "cuts")
    change_config(run, lambda about: [about["training"].pop(name) for name in new])
    with pytest.raises(ValueError, match="boxes: nested -> uniform"):
        train(options(clips, run, boxes="uniform", steps=2, save_every=1))
    train(options(clips, run, steps=2, save_every=1))
    losses = [[json.loads(line)["loss"] for line in (r / "log.jsonl").read_text().splitlines()] for r in (whole, run)]
    assert losses[0] == losses[1]
    kept = json.loads((run / "config.json").read_text())["training"]
    assert (kept["boxes"], kept["clean_context"]) == ("nested", 0.0)
