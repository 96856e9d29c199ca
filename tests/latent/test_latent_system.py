"""Latent diffusion goes through the commands: it learns, resumes, contains its autoencoder, samples and is exported."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hpdm import cli, distributed, runs
from hpdm.commands.sample import SampleOptions, sample
from hpdm.commands.train import train
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import probe
from hpdm.latent import coding
from hpdm.latent.denoiser import Conditions
from hpdm.latent.latent_model import hash_of_autoencoder
from hpdm.latent.long_sampler import LatentLongSampler
from hpdm.latent.sampler import NOT_FOR_LATENTS, LatentSampler
from hpdm.latent.system import NOTHING_KNOWN
from hpdm.long_video import LongOptions
from hpdm.sampling import SamplerOptions
from hpdm.training.checkpoint import newest_checkpoint
from tests.latent.latent_runs import (
    long_latent_config,
    random_latent_model,
    save_autoencoder,
    small_latent_config,
    train_latents,
)  # fmt: skip
from tests.processes import run_ranks
from tests.small import stop_after_checkpoint

QUICK = SamplerOptions(steps=3, solver="2m", overlap="none")


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def tensors(run, part="model"):
    return load_file(next((newest_checkpoint(run) / part).iterdir()))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    return save_autoencoder(tmp_path_factory.mktemp("first_stage") / "ae")


@pytest.fixture(scope="module")
def run(clips, autoencoder, tmp_path_factory):
    """A finished run with validation and sheets."""
    folder = tmp_path_factory.mktemp("latent") / "run"
    train(
        train_latents(
            clips, folder, autoencoder, steps=30, save_every=15, validation=clips, validate_every=15, sample_every=30,
            sample_steps=2, images=0.2, flip=True,
        )
    )  # fmt: skip
    return folder


def test_it_learns(run):
    losses = [row["loss_latent"] for row in rows(run) if "loss_latent" in row]
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert len([row["validation_latent"] for row in rows(run) if "validation" in row]) == 2
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000030.png"]


def test_it_contains_its_autoencoder_unchanged(run, autoencoder, clips, tmp_path):
    """In every set of weights and in an exported file, which needs nothing else."""
    first = runs.load(autoencoder).model
    video = torch.stack([VideoDataset(clips, frames=8, size=(32, 32))[i]["video"] for i in range(2)])
    latents = coding.encode(first, video)
    runs.export(run, tmp_path / "all.safetensors")
    for loaded in (runs.load(run), runs.load(run, weights="model"), runs.load(tmp_path / "all.safetensors")):
        assert (
            loaded.config.autoencoder_hash
            == hash_of_autoencoder(first)
            == hash_of_autoencoder(loaded.model.autoencoder)
        )
        assert torch.equal(coding.encode(loaded.model.autoencoder, video), latents)
    trained = tensors(run, "optimizer")
    assert trained
    assert not any("autoencoder" in name for name in trained)


def test_its_loss_is_the_error_of_the_latents_of_the_clips(clips, run):
    """Against the formula by itself, with nothing dropped and nothing known."""
    loaded = runs.load(run)
    system, config = loaded.system, loaded.config
    video = torch.stack([VideoDataset(clips, frames=8, size=(32, 32))[i]["video"] for i in range(3)])
    labels = torch.tensor([0, 1, 0])
    errors, parts = system.errors(loaded.model, {"video": video, "labels": labels}, torch.Generator().manual_seed(3))
    draws = system.draw(config, 3, torch.Generator().manual_seed(3), objective=NOTHING_KNOWN)
    z = loaded.model.autoencoder.encode(video.float() / 127.5 - 1)
    g = torch.cos(draws.t * math.pi / 2).square()[:, None, None, None, None]
    v = loaded.model(g.sqrt() * z + (1 - g).sqrt() * draws.noise, draws.t, labels)
    expected = (v - (g.sqrt() * draws.noise - (1 - g).sqrt() * z)).square().mean((1, 2, 3, 4))
    assert not parts
    torch.testing.assert_close(errors["latent"], expected, rtol=1e-4, atol=1e-6)


def test_it_resumes_bit_for_bit_without_naming_its_autoencoder(clips, autoencoder, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(train_latents(clips, whole, autoencoder))
    with monkeypatch.context() as patched:
        stop_after_checkpoint(3, patched)
        with pytest.raises(KeyboardInterrupt):
            train(train_latents(clips, parts, autoencoder))
    train(train_latents(clips, parts, None))
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(whole)]
    for part in ("model", "ema", "optimizer"):
        found, expected = tensors(parts, part), tensors(whole, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), part


def test_a_run_that_starts_from_another_has_its_autoencoder(clips, run, autoencoder, tmp_path):
    train(train_latents(clips, tmp_path / "more", None, init=run, steps=1))
    assert hash_of_autoencoder(runs.load(tmp_path / "more").model.autoencoder) == hash_of_autoencoder(
        runs.load(autoencoder).model
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(clips, autoencoder, parallel, tmp_path):
    train_in_a_group(clips, tmp_path / "one", autoencoder, "ddp")
    run_ranks(train_in_a_group, 2, clips, tmp_path / "two", autoencoder, parallel)
    one, two = ([row["loss"] for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)
    first = hash_of_autoencoder(runs.load(autoencoder).model)
    assert hash_of_autoencoder(runs.load(tmp_path / "two").model.autoencoder) == first
    # Sheets are made by a whole copy of a sharded model, the autoencoder included.
    one, two = (pixels(tmp_path / name / "samples" / "step-00000002.png") for name in ("one", "two"))
    assert abs(one - two).mean() < 1


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image, float)


def train_in_a_group(clips, out, autoencoder, parallel):
    train(
        train_latents(
            Path(clips),
            Path(out),
            Path(autoencoder),
            steps=2,
            batch=4,
            parallel=parallel,
            sample_every=2,
            sample_steps=2,
        )
    )


def test_videos_depend_on_their_own_seed_alone():
    model = random_latent_model(small_latent_config())
    sampler = LatentSampler(model, QUICK)
    labels = torch.tensor([0, 3, 5])
    (together,) = sampler([4, 9, 2], labels)
    assert together.shape == (3, 3, 8, 32, 32)
    assert together.abs().max() <= 1
    for n, seed in enumerate((4, 9, 2)):
        (alone,) = sampler([seed], labels[n : n + 1])
        torch.testing.assert_close(alone[0], together[n], atol=1e-4, rtol=0)
    latents = sampler.latents([4, 9, 2], Conditions(labels))
    torch.testing.assert_close(sampler.decoded(latents), together)
    small = LatentSampler(model, SamplerOptions(steps=3, solver="2m", tile_batch=1))([4, 9, 2], labels)[0]
    torch.testing.assert_close(small, together, atol=1e-4, rtol=0)


def test_ranks_share_the_videos(tmp_path):
    (expected,) = LatentSampler(random_latent_model(small_latent_config()), QUICK)([1, 2, 3], torch.tensor([0, 1, 2]))
    run_ranks(sample_in_a_group, 2, tmp_path)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-4, rtol=0)
    for scheme in ("autoregressive", "hierarchical"):
        expected = long_videos(scheme)
        for rank in range(2):
            found = torch.load(tmp_path / f"{scheme}{rank}.pt")
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def long_videos(scheme):
    """Three videos of 9 frames, sampled window by window."""
    sampler = LatentLongSampler(random_latent_model(long_latent_config()), QUICK, LongOptions(scheme))
    return torch.cat([s.frames for s in sampler.segments([1, 2, 3], 9, torch.tensor([0, 1, 2]))], dim=2)


def sample_in_a_group(folder):
    with distributed.process_group(torch.device("cpu")):
        sampler = LatentSampler(random_latent_model(small_latent_config()), QUICK)
        torch.save(sampler([1, 2, 3], torch.tensor([0, 1, 2]))[0], Path(folder) / f"{distributed.rank()}.pt")
        for scheme in ("autoregressive", "hierarchical"):
            torch.save(long_videos(scheme), Path(folder) / f"{scheme}{distributed.rank()}.pt")


def test_the_commands_sample_evaluate_and_plan(run, clips, tmp_path, capsys):
    options = SampleOptions(run, tmp_path / "out", count=2, sampler=SamplerOptions(steps=2, solver="ddim"))
    for path in sample(options):
        found = probe(path)
        assert (found.frames, found.height, found.width) == (8, 32, 32)
    for arguments in (
        ["evaluate", "--run", str(run), "--data", str(clips), "--metrics", "denoising", "--clips", "2", "--bins", "1"],
        ["evaluate", "--run", str(run), "--data", str(clips), "--metrics", "reconstruction", "--clips", "2"],
        ["plan", "--preset", "lvdm_tiny", "--kernels", "torch", "--recompute", "none"],
    ):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(arguments)
    printed = capsys.readouterr().out
    assert "latent" in printed
    assert "PSNR" in printed
    assert "temporal attention" in printed


@pytest.mark.parametrize("name", NOT_FOR_LATENTS)
def test_options_of_levels_and_tiles_are_refused(name):
    other = {
        "steps_decay": 0.25, "later_solver": "ddim", "overlap": "f", "tiles_per_patch": 4, "later_guidance": 2.0,
        "context_noise": 0.1, "consistency": 0.5, "later_known_noise": 0.1, "clip": False, "cache": "cpu",
    }[name]  # fmt: skip
    with pytest.raises(ValueError, match=f"^{name}: got .* expected none: latent diffusion has no levels"):
        LatentSampler(random_latent_model(small_latent_config()), SamplerOptions(**{name: other}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"autoencoder": None}, "autoencoder: got none, expected a run of an autoencoder"),
        ({"patch": (4, 16, 16)}, "patch: got .* this preset's model has no choice"),
        ({"crop": (4, 16, 16)}, "crop: got .* this preset's model has no choice"),
        ({"cuts": True}, "cuts: got True, expected False: this preset's model has no choice"),
        ({"resolution": (8, 36, 32)}, r"resolution: got \(8, 36, 32\), expected multiples of \(4, 8, 8\)"),
        ({"preset": "tiny"}, "autoencoder: got .*, expected none: tiny has no autoencoder"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(clips, autoencoder, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(train_latents(clips, tmp_path / "run", **({"autoencoder": autoencoder} | changes)))


def test_other_autoencoders_are_refused(clips, run, autoencoder, tmp_path):
    other = save_autoencoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"autoencoder: got .*, expected the one that the run has"):
        train(train_latents(clips, tmp_path / "more", other, init=run))
    wide = save_autoencoder(tmp_path / "wide", latent_channels=5)
    with pytest.raises(ValueError, match="autoencoder: got latents of 5 channels, expected 4"):
        train(train_latents(clips, tmp_path / "more", wide))
    unfinished = save_autoencoder(tmp_path / "unfinished", measured=False)
    with pytest.raises(ValueError, match=r"autoencoder: got .*, whose training is not finished"):
        train(train_latents(clips, tmp_path / "more", unfinished))
    with pytest.raises(ValueError, match=r"autoencoder: got .*, a run of the system 'latent', expected an autoencoder"):
        train(train_latents(clips, tmp_path / "more", run))
