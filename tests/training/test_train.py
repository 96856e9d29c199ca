"""Training runs: the curve continues after any stop, bad input is named, nothing is lost."""

import json
import os
import shutil
import signal
from functools import partialmethod

import pytest
import torch

import hpdm.training.trainer as training
from hpdm import presets, runs
from hpdm.commands.train import prepare, train
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import DecodeError
from hpdm.data.synthetic import render_synthetic
from hpdm.patch.system import PatchDiffusion
from hpdm.text import EmbeddingInfo, EmbeddingStore
from hpdm.training.batches import collate
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.options import train_options
from tests.small import change_config, stop_after_checkpoint
from tests.small import train_options as options


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["loss_level_0"], row["grad_norm"], row["lr"]) for row in rows]


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_an_interrupted_run_continues_bit_for_bit(clips, saved_run, tmp_path, monkeypatch, optimizer):
    uninterrupted = saved_run
    if optimizer != "adamw":
        uninterrupted = tmp_path / "uninterrupted"
        train(options(clips, uninterrupted, optimizer=optimizer))
    stop_after_checkpoint(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(options(clips, tmp_path / "parts", optimizer=optimizer))
    monkeypatch.undo()
    # A killed process may have logged steps after its last checkpoint, the last of them half.
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 4, "loss": 99.0}) + '\n{"step": 5, "lo')
    train(options(clips, tmp_path / "parts", optimizer=optimizer))
    assert losses(tmp_path / "parts") == losses(uninterrupted)
    whole, parts = (runs.load(folder).model for folder in (uninterrupted, tmp_path / "parts"))
    for (name, p), (_, q) in zip(whole.named_parameters(), parts.named_parameters()):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("recompute", ["selective", "block"])
def test_recomputing_changes_losses_by_rounding_alone(clips, saved_run, tmp_path, recompute):
    """The first to no bit: the forward pass is the same. Gradients of the read are summed in another order."""
    train(options(clips, tmp_path / "recomputed", recompute=recompute))
    kept, again = losses(saved_run), losses(tmp_path / "recomputed")
    assert again[0][:2] == kept[0][:2]
    assert [row[1] for row in again] == pytest.approx([row[1] for row in kept], rel=1e-5)


def test_mixed_precision_trains_close_by(clips, saved_run, tmp_path):
    train(options(clips, tmp_path / "bf16", precision="bf16"))
    exact, mixed = losses(saved_run), losses(tmp_path / "bf16")
    assert exact != mixed
    assert [row[1] for row in mixed] == pytest.approx([row[1] for row in exact], rel=0.02)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_run_of_a_version_without_an_option_resumes(clips, saved_run, tmp_path):
    run = shutil.copytree(saved_run, tmp_path / "run")
    change_config(run, lambda stored: [stored["training"].pop(name) for name in ("precision", "recompute")])
    train(options(clips, run))
    with pytest.raises(ValueError, match="precision: fp32 -> bf16"):
        train(options(clips, run, precision="bf16"))


def test_results_do_not_depend_on_decoding_processes(clips, tmp_path):
    train(options(clips, tmp_path / "none", steps=3))
    train(options(clips, tmp_path / "two", steps=3, workers=2, cache_mb=0))
    assert losses(tmp_path / "none") == losses(tmp_path / "two")


def test_a_finished_run_has_everything(clips, tmp_path):
    train(options(clips, tmp_path, sample_every=6, sample_steps=2, log="tensorboard"))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]
    assert (tmp_path / "samples" / "step-00000006.png").stat().st_size > 1000
    assert list((tmp_path / "tensorboard").glob("events.*"))
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "loss_level_0", "loss_level_2", "lr", "clips_per_s", "data_share"} <= set(row)
    run = runs.load(tmp_path)
    model, names, step = run.model, run.classes, run.step
    assert (names, step, model.config.resolution) == (["RedDisc", "GreenSquare"], 6, (8, 32, 32))


def test_a_run_can_start_from_another_ones_weights(clips, saved_run, tmp_path):
    train(options(clips, tmp_path / "second", init=saved_run, lr=0.0, steps=1, ema_decay=0.5))
    first, second = (runs.load(folder, weights="model").model for folder in (saved_run, tmp_path / "second"))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    average = runs.load(tmp_path / "second").model
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), average.parameters()))
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        train(options(clips, tmp_path / "third", init=tmp_path))
    with pytest.raises(ValueError, match="of another config"):
        train(options(clips, tmp_path / "third", init=saved_run, coordinates=False))


def test_all_levels_start_from_a_base_of_the_lowest(clips, tmp_path):
    train(options(clips, tmp_path / "base", resolution=(2, 8, 8)))
    train(options(clips, tmp_path / "full", base=tmp_path / "base", lr=0.0, steps=1, ema_decay=0.5))
    base, full = (runs.load(tmp_path / name, weights="model").model for name in ("base", "full"))
    average = runs.load(tmp_path / "base").model
    assert (base.config.levels, full.config.levels) == (1, 3)
    assert torch.equal(full.tokenizer.weight, average.tokenizer.weight)
    with pytest.raises(ValueError, match="base: got both init and base"):
        options(clips, tmp_path, base=tmp_path, init=tmp_path)
    with pytest.raises(ValueError, match="width"):
        train(options(clips, tmp_path / "other", base=tmp_path / "base", preset="hpdm_s"))


def test_micro_batches_add_up_and_stay_what_they_were(clips, tmp_path):
    train(options(clips, tmp_path, batch=4, micro_batch=2))
    assert json.loads((tmp_path / "config.json").read_text())["training"]["micro_batch"] == 2
    train(options(clips, tmp_path, batch=4))
    with pytest.raises(ValueError, match="micro_batch: 2 -> 4"):
        train(options(clips, tmp_path, batch=4, micro_batch=4))
    with pytest.raises(ValueError, match="batch: got 4, expected a multiple of 1 process"):
        train(options(clips, tmp_path / "other", batch=4, micro_batch=3))


def test_a_step_is_the_mean_over_its_micro_batches(clips, tmp_path):
    job = prepare(options(clips, tmp_path, batch=4, micro_batch=2))
    trainer = training.Trainer(job, torch.device("cpu"))
    batches = [collate([job.dataset[key] for key in keys]) for _, keys in zip(range(2), iter(trainer.batches))]
    assert batches[0]["paths"] != batches[1]["paths"]
    for batch, number in zip(batches, trainer.batches.numbers(0)):
        losses = trainer.losses(batch, trainer.draw(number))
        (torch.stack(list(losses.values())).mean() / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    done, rate = trainer.train_step(batches)
    assert bool(done.applied)
    assert float(done.norm) == pytest.approx(float(expected), rel=1e-6)
    assert rate == pytest.approx(job.recipe.lr / job.recipe.warmup)
    assert trainer.loss_names == ["level_0", "level_1", "level_2"]
    assert done.losses.shape == (3,)


def test_captions_condition_a_run_through_their_embeddings(clips, tmp_path):
    captions = sorted({file.caption for file in VideoDataset(clips, frames=8, size=32, captions=True).files})
    store = EmbeddingStore.create(tmp_path / "embeddings", EmbeddingInfo("random", 24, 8, "fp32"))
    store.add(captions[1:], [torch.randn(1 + n % 5, 24) for n in range(len(captions) - 1)])
    changes = {"images": 0.5, "self_conditioning": 0.9, "steps": 3, "workers": 1}
    run = options(clips, tmp_path / "run", embeddings=tmp_path / "embeddings", **changes)
    with pytest.raises(ValueError, match=r"lacks 1 of the clips' captions, .* run `hpdm data embed --data"):
        train(run)
    store.add(captions[:1], [torch.randn(2, 24)])
    train(run)
    loaded = runs.load(tmp_path / "run")
    assert (loaded.classes, loaded.config.conditioning, loaded.config.text_width) == ([], "text", 24)
    with pytest.raises(ValueError, match="embeddings: got width 24, expected 1024 as of"):
        train(options(clips, tmp_path / "other", embeddings=tmp_path / "embeddings", preset="hpdm_t2v"))


def test_a_compiled_network_trains_as_it_does_uncompiled(clips, tmp_path, monkeypatch):
    """One level, traced by the compiler; code is not generated, which would take a minute."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    train(options(clips, tmp_path / "plain", resolution=(2, 8, 8), steps=2))
    train(options(clips, tmp_path / "compiled", resolution=(2, 8, 8), steps=2, compile=True))
    plain, compiled = losses(tmp_path / "plain"), losses(tmp_path / "compiled")
    assert [row[1] for row in compiled] == pytest.approx([row[1] for row in plain], rel=1e-5)


def test_presets_carry_the_papers_recipe(clips, tmp_path):
    """Table 8."""
    recipe = presets.recipe("hpdm_l")
    assert (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.warmup) == ("lamb", 0.005, 0.01, 10_000)
    assert (recipe.batch, recipe.steps, recipe.parallel) == (768, 65_000, "ddp")
    changed = train_options(data=clips, out=tmp_path, preset="hpdm_t2v", steps=3)
    recipe = changed.recipe.applied_to(presets.recipe("hpdm_t2v"))
    assert (recipe.batch, recipe.images, recipe.warmup, recipe.parallel, recipe.steps) == (8192, 0.5, 5000, "fsdp", 3)


def test_a_profile_shows_the_parts_of_a_step(clips, tmp_path):
    train(options(clips, tmp_path, profile=1))
    names = {
        event.get("name") for event in json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    }
    assert {"data", "forward", "backward", "optimizer"} <= names
    assert "Self CPU" in (tmp_path / "profile" / "summary.txt").read_text()


def test_a_wish_to_stop_waits_for_the_step_and_a_checkpoint(clips, tmp_path, monkeypatch):
    real = training.Trainer.train_step

    def signalled(self, batches):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batches)

    monkeypatch.setattr(training.Trainer, "train_step", signalled)
    with pytest.raises(KeyboardInterrupt):
        train(options(clips, tmp_path, sample_every=2, validate_every=2, validation=clips))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert not (tmp_path / "samples").exists()  # a scheduler does not wait for long
    assert not any("validation" in line for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_another_config_or_schedule_is_refused(clips, saved_run, tmp_path):
    run = shutil.copytree(saved_run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another config \(coordinates: True -> False\)"):
        train(options(clips, run, coordinates=False))
    with pytest.raises(ValueError, match=r"other options \(warmup: 2 -> 3\)"):
        train(options(clips, run, warmup=3))
    with pytest.raises(ValueError, match=r"steps: got 5, expected at least 6, which the run at .* has done"):
        train(options(clips, run, steps=5))
    other = render_synthetic(tmp_path / "other", clips=2, frames=12, size=(32, 32), classes=["RedDisc", "BlueTriangle"])
    with pytest.raises(ValueError, match=r"classes \['RedDisc', 'BlueTriangle'\], expected"):
        train(options(other, run))
    assert losses(run) == losses(saved_run)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"preset": "huge"}, "preset: got 'huge'"),
        ({"preset": "hpdm_t2v", "patch": None, "resolution": None}, "conditioned on text"),
        ({"resolution": (8, 32, 24)}, "resolution: got"),
        ({"resolution": (16, 64, 64), "short": "error"}, r"got 12 frames, expected >= 16 \(frames=16, stride=1\)"),
        (
            {"resolution": (16, 64, 64)},
            r"none of the 6 clips can be used; .* got 12 frames, expected >= 16 \(frames=16",
        ),
    ],
)
def test_bad_choices_are_named_before_anything_is_written(clips, tmp_path, changes, match):
    with pytest.raises((ValueError, DecodeError), match=match):
        train(options(clips, tmp_path / "run", **changes))
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    "field", ["steps", "batch", "micro_batch", "log_every", "save_every", "stride", "lr", "seed", "profile"]
)
def test_bad_numbers_are_named(clips, tmp_path, field):
    with pytest.raises(ValueError, match=f"{field}: got -1"):
        options(clips, tmp_path, **{field: -1})


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        train(options(tmp_path / "nowhere", tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no videos in"):
        train(options(tmp_path / "empty", tmp_path / "run"))


def test_a_loss_that_is_not_finite_stops_the_run(clips, tmp_path, monkeypatch):
    real = PatchDiffusion.losses

    def broken(*arguments, **options):
        return {name: loss * float("nan") for name, loss in real(*arguments, **options).items()}

    monkeypatch.setattr(PatchDiffusion, "losses", broken)
    match = "the norm of the gradient is not finite at the 6 steps up to 6; there is no checkpoint yet"
    with pytest.raises(FloatingPointError, match=match):
        train(options(clips, tmp_path, save_every=9))
    assert not list_checkpoints(tmp_path)


def test_a_missing_device_is_named(clips, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(RuntimeError, match="device: got 'cuda'"):
        train(options(clips, tmp_path, device="cuda"))


def test_evaluation_is_repeatable_and_sees_improvement(clips, tmp_path):
    from hpdm.commands.evaluate import EvaluateOptions, evaluate

    train(options(clips, tmp_path, steps=80, save_every=40, lr=3e-3, batch=4, seed=1))
    first, last = list_checkpoints(tmp_path)
    common = {"data": clips, "split": None, "clips": 4, "bins": 2, "weights": "model"}
    results = [evaluate(EvaluateOptions(run_folder=path, **common)) for path in (first, last, last)]
    assert results[1] == results[2]
    means = [sum(map(sum, r["error"])) for r in results]
    assert means[1] < means[0]
    with pytest.raises(ValueError, match="data: got classes"):
        evaluate(EvaluateOptions(run_folder=tmp_path, **(common | {"data": clips / "RedDisc"})))
