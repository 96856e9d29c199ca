"""Runs that go on with another schedule, runs with several moving averages, and runs of earlier versions."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hpdm import runs
from hpdm.commands.train import train
from hpdm.recipe import Recipe, recipe_from_json
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.schedule import learning_rate
from tests.small import train_options as options


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def training_of(run):
    return json.loads((run / "config.json").read_text())["training"]


@pytest.fixture(scope="module")
def extended(clips, saved_run, tmp_path_factory):
    """A finished run of 6 steps that went on to step 8 along a longer cosine, then to step 9 at a constant rate."""
    run = shutil.copytree(saved_run, tmp_path_factory.mktemp("extended") / "run")
    train(options(clips, run, steps=8))
    train(options(clips, run, steps=9, schedule="constant", lr=2e-4))
    return run


def test_a_finished_run_goes_on_with_the_new_schedule(saved_run, extended):
    before, after = rows(saved_run), rows(extended)
    assert [row["step"] for row in after] == list(range(1, 10))
    assert [row["loss"] for row in after[:6]] == [row["loss"] for row in before]
    expected = [learning_rate(step, 8, 2, 1e-3) for step in (6, 7)] + [2e-4]
    assert [row["lr"] for row in after[6:]] == pytest.approx(expected)
    assert list_checkpoints(extended)[-1].name == "step-00000009"


def test_what_changed_is_kept_in_its_config(extended):
    training = training_of(extended)
    assert (training["steps"], training["schedule"], training["lr"]) == (9, "constant", 2e-4)
    assert training["history"] == [
        {"step": 6, "changes": {"steps": [6, 8]}},
        {"step": 8, "changes": {"steps": [8, 9], "lr": [1e-3, 2e-4], "schedule": ["cosine", "constant"]}},
    ]


def test_what_is_not_given_stays_and_what_changes_is_said(clips, extended, tmp_path, caplog):
    run = shutil.copytree(extended, tmp_path / "run")
    with caplog.at_level(logging.WARNING, logger="hpdm.commands.resume"):
        train(options(clips, run, steps=None, lr=None, warmup=None, batch=None))  # not 10,000 steps, as the preset has
        assert not caplog.records
        assert training_of(run) == training_of(extended) | {"out": str(run)}
        train(options(clips, run, steps=12, lr=None, cooldown=2, lr_scaling="sqrt"))
    assert [record.getMessage() for record in caplog.records] == [
        f"{run} goes on from step 9 with steps: 9 -> 12, lr_scaling: none -> sqrt, cooldown: 0 -> 2"
    ]
    peak = 2e-4 * (3 / 16) ** 0.5  # the preset's rate is for batches of 16
    assert [row["lr"] for row in rows(run)[9:]] == pytest.approx([peak, peak, peak / 2])


def test_schedules_are_checked_before_the_work_begins(clips, extended, tmp_path):
    with pytest.raises(ValueError, match=r"steps: got 8, expected at least 9, which the run at .* has done"):
        train(options(clips, extended, steps=8))
    with pytest.raises(ValueError, match="cooldown: got 2 with schedule cosine"):
        train(options(clips, tmp_path / "new", cooldown=2))
    with pytest.raises(ValueError, match=r"expected a relative width .* a decay is --ema-decay"):
        options(clips, tmp_path / "new", ema=(0.9999,))
    with pytest.raises(ValueError, match="expected one of the two"):
        options(clips, tmp_path / "new", ema=(0.1,), ema_decay=0.9)
    with pytest.raises(ValueError, match=r"other options \(ema: \[0.05\] -> \[0.1\]\)"):
        train(options(clips, extended, steps=9, ema=(0.1,)))
    assert not (tmp_path / "new").exists()


def test_one_of_several_averages_is_chosen_afterwards(clips, tmp_path):
    run = tmp_path / "run"
    train(options(clips, run, steps=3, save_every=2, ema=(0.25, 0.1)))
    (run / "checkpoints" / "step-00000003").rename(run / "checkpoints" / "lost")
    train(options(clips, run, steps=None))  # resumes from step 2, both averages included
    models = {name: runs.load(run, weights=name).model for name in ("model", "ema", "ema-0.10")}
    assert torch.equal(runs.load(run, weights="ema-.25").model.latents, models["ema"].latents)
    away = {name: float((model.latents - models["model"].latents).norm()) for name, model in models.items()}
    assert 0 == away["model"] < away["ema-0.10"] < away["ema"]  # the narrower lies closer to the last weights
    for folder in ("ema", "ema-0.100"):
        (first,), (second,) = (
            list((run / "checkpoints" / step / folder).iterdir()) for step in ("lost", "step-00000003")
        )
        again = load_file(second)
        assert all(torch.equal(value, again[name]) for name, value in load_file(first).items())
    assert runs.export(run, tmp_path / "wide.safetensors", weights="ema-0.1") == 3
    loaded = runs.load(tmp_path / "wide.safetensors", weights="ema-0.10").model
    assert torch.equal(loaded.latents, models["ema-0.10"].latents)
    with pytest.raises(ValueError, match=r"weights: got 'ema', expected 'ema-0.100', which is what .* holds"):
        runs.load(tmp_path / "wide.safetensors")
    with pytest.raises(
        ValueError, match=r"weights: got 'ema-0.2', expected one of 'model', 'ema', 'ema-0.250', 'ema-0.1"
    ):
        runs.load(run, weights="ema-0.2")


def test_a_run_of_an_earlier_version_keeps_its_recipe():
    """An option that its config lacks means what the code did then."""
    old = {"steps": 5, "batch": 4, "optimizer": "lamb", "lr": 0.01, "warmup": 1, "weight_decay": 0.02, "ema": 0.9}
    got = recipe_from_json(old, Recipe(batch=64))
    assert got == Recipe(
        5, 4, lr=0.01, lr_batch=64, warmup=1, weight_decay=0.02, lamb_floor="off", ema=(), ema_decay=0.9
    )
