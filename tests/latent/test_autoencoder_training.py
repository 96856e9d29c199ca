"""The autoencoder goes through the commands: it learns, resumes, measures its latents, is exported and evaluated."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpdm import cli, distributed, runs
from hpdm.commands.evaluate import evaluate
from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.reconstruction_options import ReconstructionOptions
from hpdm.commands.train import train
from hpdm.data.clips import VideoDataset
from hpdm.latent import coding
from hpdm.latent.autoencoder_system import Autoencoding
from hpdm.training.checkpoint import list_checkpoints, newest_checkpoint
from tests.latent.small_autoencoder import train_options as options
from tests.processes import run_ranks
from tests.small import stop_after_checkpoint

STEPS = 24


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def tensors(run, part="model"):
    return load_file(next((newest_checkpoint(run) / part).iterdir()))


def training_clips(root):
    """The windows that are measured: those of epoch 0."""
    dataset = VideoDataset(root, frames=8, size=(32, 32))
    return torch.stack([dataset[i]["video"] for i in range(len(dataset))])


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """A finished run with validation, sheets and two moving averages."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    train(
        options(
            clips, folder, steps=STEPS, save_every=12, ema=(0.05, 0.10), validation=clips, validate_every=12,
            sample_every=12, snapshot_every=12, flip=True, images=0.25,
        )
    )  # fmt: skip
    return folder


def test_it_learns(run):
    logged = rows(run)
    losses = [row for row in logged if "loss" in row]
    assert list(losses[0])[:4] == ["step", "loss", "loss_pixel", "loss_edges"]
    assert losses[-1]["loss_pixel"] < 0.5 * losses[0]["loss_pixel"]
    validations = [row for row in logged if "validation" in row]
    assert list(validations[0]) == [
        "step", "validation", "validation_pixel", "validation_edges", "validation_psnr"
    ]  # fmt: skip
    assert validations[1]["validation_psnr"] > validations[0]["validation_psnr"]


def test_sheets_show_clips_and_reconstructions(run):
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-00000012.png", "step-00000024.png"]


@pytest.mark.parametrize("weights", ["model", "ema", "ema-0.10"])
def test_latents_of_the_training_clips_have_mean_0_and_standard_deviation_1(clips, run, weights):
    """For the last weights and for each of their averages, which have other latents."""
    model = runs.load(run, weights=weights).model
    assert model.is_measured
    z = coding.encode(model, training_clips(clips)).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(4, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)


def test_averages_have_statistics_of_their_own(run):
    found = [tensors(run, part)["latent_std"] for part in ("model", "ema", "ema-0.100")]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


def test_an_exported_file_and_the_last_snapshot_are_the_run(clips, run, tmp_path):
    video = training_clips(clips)[:2]
    loaded = runs.load(run)
    z = coding.encode(loaded.model, video)
    runs.export(run, tmp_path / "whole.safetensors")
    for path in (tmp_path / "whole.safetensors", run / "snapshots" / f"step-{STEPS:08d}.safetensors"):
        other = runs.load(path)
        assert (other.system.name, other.config, other.step) == ("autoencoder", loaded.config, STEPS)
        assert torch.equal(coding.encode(other.model, video), z)
    runs.export(run, tmp_path / "half.safetensors", precision="fp16")
    torch.testing.assert_close(
        coding.encode(runs.load(tmp_path / "half.safetensors").model, video), z, atol=0.05, rtol=0
    )
    assert not runs.load(run / "snapshots" / "step-00000012.safetensors").model.is_measured


def test_it_resumes_bit_for_bit_and_measures_at_the_end_alone(clips, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(options(clips, whole, crop=(4, 16, 16)))
    with monkeypatch.context() as patched:
        stop_after_checkpoint(3, patched)
        with pytest.raises(KeyboardInterrupt):
            train(options(clips, parts, crop=(4, 16, 16)))
    assert not tensors(parts)["latent_std"].any()
    train(options(clips, parts, crop=(4, 16, 16)))
    assert [row["loss"] for row in rows(parts)] == [row["loss"] for row in rows(whole)]
    for part in ("model", "ema", "optimizer"):
        found, expected = tensors(parts, part), tensors(whole, part)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found), part


def test_micro_batches_change_a_run_by_rounding_alone(clips, tmp_path):
    for micro in (3, 1):
        train(options(clips, tmp_path / f"{micro}", steps=3, micro_batch=micro, crop=(4, 16, 16), flip=True))
    losses = [[row["loss"] for row in rows(tmp_path / f"{micro}")] for micro in (3, 1)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # Adam's first steps are signs of gradients


def test_a_run_that_goes_on_forgets_and_measures_again(clips, run, tmp_path, caplog):
    longer = shutil.copytree(run, tmp_path / "run")
    changed = {"ema": (0.05, 0.10), "validation": clips, "validate_every": 12, "flip": True, "images": 0.25}
    train(options(clips, longer, steps=STEPS + 2, save_every=STEPS + 1, **changed))
    assert [path.name for path in list_checkpoints(longer)] == [f"step-{STEPS + n:08d}" for n in (1, 2)]
    between = load_file(next((list_checkpoints(longer)[0] / "ema").iterdir()))
    assert not between["latent_std"].any()
    assert (tensors(longer, "ema")["latent_std"] > 0).all()
    assert not torch.equal(tensors(longer, "ema")["latent_std"], tensors(run, "ema")["latent_std"])
    # A run whose last step is done measures nothing twice.
    before = newest_checkpoint(longer).stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="hpdm.training.measuring"):
        train(options(clips, longer, steps=STEPS + 2, save_every=STEPS + 1, **changed))
    assert not [record for record in caplog.records if record.name == "hpdm.training.measuring"]
    assert newest_checkpoint(longer).stat().st_mtime_ns == before


def test_a_run_that_is_given_fewer_steps_is_measured_where_it_is(clips, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after_checkpoint(3, patched)
        with pytest.raises(KeyboardInterrupt):
            train(options(clips, tmp_path / "run"))
    weights = tensors(tmp_path / "run")
    train(options(clips, tmp_path / "run", steps=3))
    found = tensors(tmp_path / "run")
    assert runs.load(tmp_path / "run").model.is_measured
    assert all(torch.equal(found[name], t) for name, t in weights.items() if not name.startswith("latent_"))


def test_an_interrupted_measurement_is_made_again_as_a_whole(clips, tmp_path, monkeypatch):
    """Interrupted after the last weights and before their average."""
    real, calls = Autoencoding.measure, []

    def measure(self, model, batches):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, model, batches)

    with monkeypatch.context() as patched:
        patched.setattr(Autoencoding, "measure", measure)
        with pytest.raises(KeyboardInterrupt):
            train(options(clips, tmp_path / "run"))
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
    train(options(clips, tmp_path / "run"))
    assert all((tensors(tmp_path / "run", part)["latent_std"] > 0).all() for part in ("model", "ema"))


def train_on_ranks(data, out):
    """Replicated, and sharded with sheets, which need the whole weights on a rank."""
    with distributed.process_group(torch.device("cpu")):
        train(options(Path(data), Path(out) / "ddp", steps=3, batch=4))
        for _ in range(2):  # the second time it reads the checkpoint
            train(options(Path(data), Path(out) / "fsdp", steps=3, batch=4, parallel="fsdp", sample_every=3))


def test_two_processes_train_and_measure_as_one(clips, tmp_path):
    train(options(clips, tmp_path / "one", steps=3, batch=4))
    run_ranks(train_on_ranks, 2, clips, tmp_path)
    one = runs.load(tmp_path / "one").model.state_dict()
    for parallel in ("ddp", "fsdp"):
        two = runs.load(tmp_path / parallel).model.state_dict()
        for name, t in one.items():
            torch.testing.assert_close(two[name], t, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert (tmp_path / "fsdp" / "samples" / "step-00000003.png").exists()


# ---- evaluation ----


def test_reconstruction_is_evaluated_beside_pooling(clips, run, tmp_path):
    whole = evaluate(EvaluateOptions(run, clips, ("reconstruction",), clips=4, batch=3))
    part = whole["reconstruction"]
    assert (whole["step"], part["clips"], part["frames"], part["chunk"]) == (STEPS, 4, 8, None)
    assert part["psnr"]["model"]["borders"] is None
    assert part["psnr"]["model"]["all"] == part["psnr"]["model"]["inside"]
    assert len(part["psnr"]["baseline"]["frame"]) == 8
    json_file = tmp_path / "scores.json"
    with pytest.raises(SystemExit) as ended:
        cli.main([
            "evaluate", "--run", f"{run}", "--data", f"{clips}", "--metrics", "reconstruction", "--clips", "4",
            "--chunk", "1", "--clip-frames", "11", "--tile", "3", "2", "--json", f"{json_file}",
        ])  # fmt: skip
    assert ended.value.code == 0
    chunked = json.loads(json_file.read_text())["reconstruction"]
    assert (chunked["frames"], chunked["tile"], chunked["overlap"]) == (11, [3, 2], None)
    assert chunked["psnr"]["model"]["borders"] is not None
    assert chunked["psnr"]["baseline"]["all"] == pytest.approx(part["psnr"]["baseline"]["all"], abs=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ("denoising",)}, "metrics: got denoising for a run of an autoencoder, expected reconstruction"),
        ({"metrics": ("reconstruction", "denoising")}, "metrics: got denoising for a run of an autoencoder"),
        ({"metrics": ("motion",)}, "metrics: got motion for a run of an autoencoder"),
    ],
)
def test_other_metrics_are_refused(clips, run, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(EvaluateOptions(run, clips, **changes))


def test_other_runs_are_not_reconstructed(clips, saved_run):
    with pytest.raises(ValueError, match="run: got one of the system 'patch', which encodes no videos"):
        evaluate(EvaluateOptions(saved_run, clips, ("reconstruction",)))
    with pytest.raises(ValueError, match="chunk: got 2 without the metric reconstruction, expected it"):
        EvaluateOptions(saved_run, clips, reconstruction=ReconstructionOptions(chunk=2))
    with pytest.raises(ValueError, match=r"tile: got \(2, 2\) without the metric reconstruction, expected it"):
        EvaluateOptions(saved_run, clips, reconstruction=ReconstructionOptions(tile=(2, 2)))


# ---- what does not apply ----


def error_of(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hpdm: error: ")]
    return line.removeprefix("hpdm: error: ")


def test_no_videos_are_sampled_from_it(run, tmp_path, capsys):
    assert error_of(capsys, "sample", "--run", run, "--out", tmp_path / "out", "--device", "cpu").startswith(
        f"run: got {run}, an autoencoder, which encodes and decodes videos, expected a run that samples them"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": (2, 8, 8)}, r"patch: got \(2, 8, 8\), expected None"),
        ({"known_frames": True}, "known_frames: got True, expected False"),
        ({"dropout": 0.2}, "dropout: got 0.2, expected None"),
        ({"fusion": "shallow"}, "fusion: got shallow, expected deep"),
        ({"times": "logit-normal"}, "times: got logit-normal, expected uniform"),
        ({"clean_context": 0.1}, "clean_context: got 0.1, expected None"),
        ({"cuts": True}, "cuts: got True, expected False"),
        ({"sample_steps": 4}, "sample_steps: got 4, expected none: lvdm_ae_tiny samples no videos"),
        ({"sample_prompts": ("a disc",)}, "sample_prompts: got .*expected none"),
        ({"optimizer": "muon"}, "optimizer: got 'muon'"),
        ({"perceptual_weight": 2.0}, "perceptual_weight: got 2.0 without perceptual"),
        ({"norm": "batch"}, "norm: got 'batch', expected one of"),
        ({"resolution": (8, 30, 32)}, r"resolution: got \(8, 30, 32\), expected multiples"),
        ({"crop": (8, 64, 64)}, r"crop: got \(8, 64, 64\), expected at most"),
    ],
)
def test_options_of_other_models_are_refused(clips, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(options(clips, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "option",
    ["norm", "crop", "loss", "perceptual", "perceptual_weight", "edge_weight", "gan_weight", "gan_start"],
)
def test_models_of_patches_refuse_those_of_autoencoders(clips, tmp_path, option):
    value = {"norm": "clip", "crop": (4, 8, 8), "loss": "l1", "perceptual": tmp_path}.get(option, 0.5)
    with pytest.raises(ValueError, match=f"{option}: got .*, expected None"):
        train(options(clips, tmp_path / "run", preset="tiny", **{option: value}))


def test_other_systems_weights_are_no_start(clips, saved_run, tmp_path):
    with pytest.raises(ValueError, match=r"base: got .*, expected none: autoencoder models do not start"):
        train(options(clips, tmp_path / "run", base=saved_run))


def test_it_starts_from_another_run(clips, run, tmp_path):
    train(options(clips, tmp_path / "run", steps=1, init=run))
    assert rows(tmp_path / "run")[0]["loss"] < 0.6 * rows(run)[0]["loss"]


def test_its_training_is_planned(tmp_path, capsys):
    out = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as ended:
        cli.main([
            "plan", "--preset", "lvdm_ae_tiny", "--resolution", "8", "32", "32", "--kernels", "torch",
            "--json", f"{out}",
        ])  # fmt: skip
    assert ended.value.code == 0
    plan = json.loads(out.read_text())
    assert sum(plan["parameters"].values()) == 305_112
    kept = [row["activations_bytes"] for row in plan["training"]]
    assert kept[0] > kept[1] > kept[2]  # none, selective, block
    assert plan["training"][0]["flops"] > 0
    assert plan["sampling"] == []
    assert "sampling one video" not in capsys.readouterr().out
    assert error_of(capsys, "plan", "--preset", "lvdm_ae_tiny", "--frames", 64).startswith(
        "frames: got 64, expected none"
    )
