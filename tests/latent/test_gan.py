"""The autoencoder against a discriminator of frames: the losses of both players, and both in one training run."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from hpdm import distributed, runs
from hpdm.commands.train import train
from hpdm.data.synthetic import render_synthetic
from hpdm.integrity import hash_of_tensor
from hpdm.latent import gan
from hpdm.latent.autoencoder_system import Autoencoding
from hpdm.latent.discriminator import FrameDiscriminator
from hpdm.latent.gan import Discriminating, adaptive_weight, hinge_loss
from hpdm.latent.losses import AutoencoderDraws
from hpdm.opponent import Game, Opponent
from hpdm.training import trainer
from hpdm.training.adamw import AdamW
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.ema import EMA, PowerLaw
from hpdm.training.second_player import SecondPlayer
from hpdm.training.step import update
from tests.latent.small_autoencoder import random_autoencoder, small_config
from tests.latent.small_autoencoder import train_options as options
from tests.processes import run_ranks

START, STEPS = 4, 6
WHOLE = AutoencoderDraws(None, None, None)


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def tensors(checkpoint, part):
    return load_file(next((checkpoint / part).iterdir()))


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a, b):
    """Within rounding; both are made of terms of about 1."""
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-5)


def options_of_run(clips, out, **changes):
    """Against a discriminator from step 4 on, of crops of 4x24x24; every checkpoint stays."""
    values = {"batch": 2, "crop": (4, 24, 24), "steps": STEPS, "save_every": 2, "keep": 0}
    return options(clips, out, **(values | {"gan_weight": 0.5, "gan_start": START} | changes))


def narrow():
    """Makes the discriminators of all runs of this process narrow."""
    gan.FrameDiscriminator = partial(FrameDiscriminator, width=4)


@pytest.fixture(autouse=True, scope="module")
def _narrow():
    narrow()
    yield
    gan.FrameDiscriminator = FrameDiscriminator


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan") / "run"
    train(options_of_run(clips, folder))
    return folder


# ---- the losses ----


def test_the_discriminator_has_the_published_size_and_scores_patches(generator):
    network = FrameDiscriminator()
    assert sum(p.numel() for p in network.parameters()) == 2_765_633  # published: 2.77 M
    assert not list(network.buffers())
    frames = torch.rand(2, 3, 31, 49, generator=generator) * 2 - 1
    assert network(frames).shape == (2, 1, 1, 4)
    assert network(frames[..., :24, :24]).shape == (2, 1, 1, 1)
    # The statistics are those of one call, and no others are kept.
    once = network.eval()(frames)
    torch.testing.assert_close(network.train()(torch.cat((frames, frames))), torch.cat((once, once)), atol=1e-4, rtol=0)


def test_hinge_losses_are_their_closed_form(generator):
    real, fake = (3 * torch.randn(n, 1, 3, 5, generator=generator, dtype=torch.float64) for n in (2, 7))
    terms = [max(0.0, 1 - s) / real.numel() for s in real.flatten().tolist()]
    terms += [max(0.0, 1 + s) / fake.numel() for s in fake.flatten().tolist()]
    assert float(hinge_loss(real, fake)) == pytest.approx(math.fsum(terms) / 2, rel=1e-12)
    assert hinge_loss(torch.tensor([1.0, 9.0]), torch.tensor([-1.0, -9.0])) == 0


def test_the_adaptive_weight_is_finite_at_a_gradient_of_zero():
    weight = torch.ones(3, requires_grad=True)
    some, nothing = weight.sum(), (0 * weight).sum()
    assert adaptive_weight(nothing, some, weight) == 0
    assert adaptive_weight(nothing, nothing, weight) == 0
    assert float(adaptive_weight(some / 2, nothing, weight)) == pytest.approx(math.sqrt(3) / 2 / 1e-4)
    assert adaptive_weight(some, nothing, weight) == 1e4  # would be 17,320


def game_of(generator, **changes):
    """A model, a discriminator of which no weight is zero, and what both get from two random clips."""
    config = small_config(resolution=(4, 24, 24), gan_weight=0.5, **changes)
    model = random_autoencoder(config, seed=int(torch.randint(2**31, (), generator=generator))).train()
    opponent = Discriminating(config)
    discriminator = opponent.build()
    batch = {"video": torch.randint(256, (2, 3, 4, 24, 24), dtype=torch.uint8, generator=generator)}
    return batch["video"].float() / 127.5 - 1, model, discriminator, opponent.play(discriminator, model, batch, WHOLE)


def grads(network):
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_gradients_reach_one_player_alone(generator):
    _, model, discriminator, game = game_of(generator)
    game.against.backward(retain_graph=True)
    assert grads(model)
    assert not grads(discriminator)
    model.zero_grad()
    game.own.backward(retain_graph=True)
    assert not grads(model)
    assert grads(discriminator).keys() == dict(discriminator.named_parameters()).keys()
    alone = grads(discriminator)
    # As in training: everything in one backward pass.
    discriminator.zero_grad()
    torch.stack([*(loss.mean() for loss in game.losses.values()), game.against, game.own]).sum().backward()
    assert_same(grads(discriminator), alone)
    assert not any(t.requires_grad for t in game.reported.values())


def test_losses_and_weight_are_those_of_plain_autograd(generator):
    x, model, discriminator, game = game_of(generator, pixel_loss="l1")
    fake, real = (video.transpose(1, 2).flatten(0, 1) for video in (model(x), x))
    generator_loss = -discriminator(fake).mean()
    assert_close(game.reported["loss_generator"], generator_loss)
    assert_close(game.own, hinge_loss(discriminator(real), discriminator(fake)))
    # The errors of pixels and of edges count one half each, as in a training step.
    error = model(x) - x
    edges = 0.1 * (error.diff(dim=3).abs().mean() + error.diff(dim=4).abs().mean())
    last = model.decoder.last.weight
    norms = [torch.autograd.grad(loss, last)[0].norm() for loss in ((error.abs().mean() + edges) / 2, generator_loss)]
    weight = norms[0] / (norms[1] + 1e-4)
    assert_close(game.reported["adaptive_weight"], weight)
    assert_close(game.against, 0.5 * weight * generator_loss)
    # So at the last layer this pulls half as strongly as the reconstruction.
    assert_close(torch.autograd.grad(game.against, last)[0].norm(), 0.5 * weight * norms[1])


# ---- one update of both ----


class Scaling(Opponent):
    """Both players are one layer; ``broken`` names whose loss is not finite."""

    def __init__(self, broken=""):
        super().__init__(1, (0.5, 0.9))
        self.broken = broken

    def build(self):
        return nn.Linear(3, 1)

    def play(self, opponent, model, batch, draws, network=None):
        out = model(batch["x"])
        against = -(out.detach() if self.broken == "own" else out).mean()
        own = opponent(out.detach()).square().mean()
        if self.broken:
            against, own = (math.nan * against, own) if self.broken == "against" else (against, math.inf * own)
        losses = {"square": out.square().mean(1), "size": out.abs().mean(1)}
        return Game(losses, against, own, {"own": own.detach()})


def updated(broken=""):
    """A step of both players from random weights; returns their states before and after it, and the average."""
    model, second = nn.Linear(3, 3), SecondPlayer(Scaling(broken), torch.device("cpu"))
    optimizer, ema = AdamW(model.parameters(), lr=1e-2), EMA(model, PowerLaw(0.1))

    def step(seed):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        return update(
            model, optimizer, ema, [lambda: second.values(model, {"x": x}, None)], clip_norm=0.1, second=second,
            accept=torch.isfinite,
        )  # fmt: skip

    def state():
        parts = [*model.parameters(), *second.network.parameters(), *ema.shadow.values()]
        for each in (optimizer, second.optimizer):
            parts += [t for of_parameter in each.state.values() for t in of_parameter.values()]
        return [t.detach().clone() for t in parts]

    second.opponent.broken = ""
    step(0)
    second.opponent.broken, before = broken, state()
    done = step(1)
    return done, before, state(), ema


def test_micro_batches_give_the_mean_gradients_of_what_each_player_minimizes(generator):
    model, second = nn.Linear(3, 3), SecondPlayer(Scaling(), torch.device("cpu"))
    opponent = nn.Linear(3, 1)
    opponent.load_state_dict(second.network.state_dict())
    clips = torch.randn(2, 5, 3, generator=generator)
    outs = [model(x) for x in clips]
    of_model = torch.stack([(out.square().mean() + out.abs().mean()) / 2 - out.mean() for out in outs]).mean()
    expected = torch.autograd.grad(of_model, list(model.parameters()))
    expected += torch.autograd.grad(
        torch.stack([opponent(out.detach()).square().mean() for out in outs]).mean(), list(opponent.parameters())
    )
    done = update(
        model, AdamW(model.parameters(), lr=0.0), EMA(model, PowerLaw(0.1)),
        [lambda x=x: second.values(model, {"x": x}, None) for x in clips], second=second,
    )  # fmt: skip
    for p, g in zip((*model.parameters(), *second.network.parameters()), expected):
        torch.testing.assert_close(p.grad, g, atol=1e-5, rtol=0)
    own = torch.stack([opponent(out).square().mean() for out in outs]).mean()
    torch.testing.assert_close(second.columns(done.losses)["own"], own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", ["against", "own"])
def test_a_step_that_is_not_finite_for_one_player_is_skipped_by_both(broken):
    done, before, after, ema = updated(broken)
    assert not done.applied
    assert len(before) == len(after) > 10
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert ema.updates == 1


def test_the_second_player_learns_by_adam_with_gradients_clipped_by_themselves():
    done, before, after, _ = updated()
    assert done.applied
    assert not any(torch.equal(a, b) for a, b in zip(before, after))
    torch.manual_seed(0)
    opponent = Scaling()
    player = SecondPlayer(opponent, torch.device("cpu"))
    expected = nn.Linear(3, 1)
    expected.load_state_dict(player.network.state_dict())
    adam = torch.optim.Adam(expected.parameters(), lr=1e-3, betas=(0.5, 0.9))
    model = nn.Linear(3, 3)
    optimizer, ema = AdamW(model.parameters(), lr=0.0), EMA(model, PowerLaw(0.1))
    for seed in range(3):
        x = 10 * torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        adam.zero_grad()
        expected(model(x).detach()).square().mean().backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        adam.step()
        update(
            model, optimizer, ema, [lambda x=x: player.values(model, {"x": x}, None)], clip_norm=0.1, second=player
        )  # fmt: skip
    for p, q in zip(player.network.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


# ---- runs ----


def test_nothing_changes_before_the_first_step_against_it(clips, run, tmp_path):
    train(options_of_run(clips, tmp_path / "plain", gan_weight=None, gan_start=None))
    mine, plain = (list_checkpoints(folder) for folder in (run, tmp_path / "plain"))
    for part in ("model", "ema", "optimizer"):
        assert_same(tensors(mine[0], part), tensors(plain[0], part))
    logged = [[row["loss"] for row in rows(folder)] for folder in (run, tmp_path / "plain")]
    assert logged[0][:START] == logged[1][:START]  # the loss of a step is of the weights before it
    assert logged[0][START] != logged[1][START]


def test_the_log_tells_of_both_players_from_the_first_step_on(run):
    columns = ("loss_generator", "loss_discriminator", "adaptive_weight")
    for row in rows(run):
        assert [name for name in row if name in columns] == list(columns if row["step"] >= START else ())
        assert row["loss"] == pytest.approx((row["loss_pixel"] + row["loss_edges"]) / 2)
    assert rows(run)[-1]["adaptive_weight"] > 0


def test_the_discriminator_learns_at_the_rate_of_the_model(run):
    """Adam's first step moves weights by the learning rate at most, and about by it where gradients are large."""
    before, after = (tensors(checkpoint, "opponent") for checkpoint in list_checkpoints(run)[:2])
    furthest = max(float((after[name] - before[name]).abs().max()) for name in after)
    assert furthest == pytest.approx(rows(run)[START - 1]["lr"], rel=1e-2)


@pytest.mark.parametrize("kept", [1, 2])
def test_it_resumes_bit_for_bit_across_the_first_step_and_after_it(clips, run, tmp_path, kept):
    other = shutil.copytree(run, tmp_path / "run")
    for checkpoint in list_checkpoints(other)[kept:]:
        shutil.rmtree(checkpoint)
    train(options_of_run(clips, other))
    names = ("loss", "grad_norm", "loss_generator", "loss_discriminator", "adaptive_weight")
    assert [[row.get(n) for n in names] for row in rows(other)] == [[row.get(n) for n in names] for row in rows(run)]
    for part in ("model", "ema", "optimizer", "opponent", "opponent_optimizer"):
        assert_same(tensors(list_checkpoints(other)[-1], part), tensors(list_checkpoints(run)[-1], part))


def test_it_is_part_of_checkpoints_alone(run, tmp_path):
    folders = {path.name for path in list_checkpoints(run)[-1].iterdir() if path.is_dir()}
    assert folders == {"model", "ema", "optimizer", "opponent", "opponent_optimizer"}
    loaded = runs.load(run)
    assert loaded.model.state_dict().keys() == random_autoencoder(loaded.config).state_dict().keys()
    with pytest.raises(ValueError, match="weights: got 'opponent', expected one of"):
        runs.load(run, weights="opponent")
    runs.export(run, tmp_path / "run.safetensors")
    with safe_open(tmp_path / "run.safetensors", "pt") as file:
        assert set(file.keys()) == set(loaded.model.state_dict())


def test_micro_batches_change_a_run_by_rounding_alone_where_their_frames_are_alike(tmp_path):
    """Statistics are those of a micro-batch, so other clips would make it another loss: here all clips are one."""
    clip = render_synthetic(tmp_path / "clips", clips=2, frames=4, size=(24, 24), classes=["RedDisc"])
    next(clip.rglob("*.mp4")).unlink()
    common = {"resolution": (4, 24, 24), "crop": None, "batch": 4, "steps": 2, "gan_start": 1}
    for micro in (4, 2):
        train(options_of_run(clip, tmp_path / f"{micro}", micro_batch=micro, **common))
    first, second = zip(*(rows(tmp_path / f"{micro}") for micro in (4, 2)))
    for name in ("loss", "grad_norm", "loss_generator", "loss_discriminator", "adaptive_weight"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-4), name
        assert second[0][name] == pytest.approx(second[1][name], rel=1e-2), name  # Adam's first step has signs


def train_on_ranks(data, out):
    """Replicated, after which the ranks compare their discriminators; sharded weights are refused."""
    made = []

    class Kept(SecondPlayer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    narrow()
    trainer.SecondPlayer = Kept
    with distributed.process_group(torch.device("cpu")):
        train(options_of_run(Path(data), Path(out) / "ddp", batch=4, steps=2, gan_start=1))
        (player,) = made
        states = [t for state in player.optimizer.state.values() for t in state.values()]
        hashes = [hash_of_tensor(t.detach()) for t in (*player.network.parameters(), *states)]
        distributed.assert_same_on_all_ranks("opponent", hashes)
        with pytest.raises(ValueError, match="parallel: got 'fsdp' with a discriminator on several processes"):
            train(options_of_run(Path(data), Path(out) / "fsdp", batch=4, parallel="fsdp"))


def test_two_processes_agree_and_train_as_one_with_their_micro_batches(clips, tmp_path):
    train(options_of_run(clips, tmp_path / "one", batch=4, micro_batch=2, steps=2, gan_start=1))
    run_ranks(train_on_ranks, 2, clips, tmp_path)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "ddp"), strict=True):
        for name in ("loss", "grad_norm", "loss_generator", "loss_discriminator", "adaptive_weight"):
            assert two[name] == pytest.approx(one[name], rel=1e-2 if one["step"] == 2 else 1e-4), name


# ---- what is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gan_weight": None}, "gan_start: got 4 without gan_weight, expected a weight with it"),
        ({"gan_weight": -0.5}, "gan_weight: got -0.5, expected a finite number, at least 0"),
        ({"gan_weight": math.nan}, "gan_weight: got nan, expected a finite number"),
        ({"gan_start": 0}, "gan_start: got 0, expected at least 1"),
        ({"crop": (4, 16, 32)}, r"gan_weight: got 0.5 with frames of \(16, 32\) pixels, expected 0, or frames of at"),
        ({"compile": True}, "compile: got true with a discriminator, expected false"),
        ({"micro_batch": "auto", "memory_gb": 4.0}, "micro_batch: got 'auto' with a discriminator, expected a number"),
    ],
)
def test_what_does_not_fit_is_refused(clips, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(options_of_run(clips, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_does_not_go_on_with_another_discriminator(clips, run):
    with pytest.raises(ValueError, match=r"holds a run of another config \(gan_start: 4 -> 5\)"):
        train(options_of_run(clips, run, gan_start=5))


def test_a_model_without_a_weight_for_it_has_no_opponent():
    assert Autoencoding().opponent(small_config()) is None
