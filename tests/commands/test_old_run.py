"""A run of version 0.1.0 as it was first written, its exported file and what both sampled then: all still the same.

``old_run/`` was written by the code before the systems had names (``config.json`` says none): two blocks of width 8,
three levels of patches of 2x8x8, four steps.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import hpdm
from hpdm.commands.train import train
from hpdm.data.synthetic import render_synthetic
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.options import train_options
from hpdm.video import to_uint8

OLD = Path(__file__).parent / "old_run"


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step-00000004", "model.safetensors"])
def test_it_loads_and_samples_as_before(source):
    loaded = hpdm.load(OLD / source)
    assert (loaded.classes, loaded.step, loaded.system.name) == (["RedDisc", "GreenSquare"], 4, "patch")
    assert loaded.config == loaded.model.config
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    then = {"spacing": "time", "later_solver": "ddim"}  # the defaults of its time
    options = hpdm.SamplerOptions(steps=4, overlap="hw", guidance=2.0, **then)
    videos = hpdm.Sampler(loaded.model, options)([7], torch.tensor([1]))
    with np.load(OLD / "sampled.npz") as expected:
        for level, video in enumerate(videos):
            now, then = to_uint8(video).numpy().astype(int), expected[f"level_{level}"].astype(int)
            # Another processor may sum in another order, which rounds a pixel differently here and there.
            assert np.abs(now - then).max() <= 1
            assert (now != then).mean() < 1e-3


def test_it_can_be_resumed(tmp_path, monkeypatch):
    """With the options of then, which had no names for what came later."""
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    about = json.loads((run / "config.json").read_text())
    clips = render_synthetic(tmp_path / "clips", clips=2, frames=12, size=(32, 32), classes=["RedDisc", "GreenSquare"])
    monkeypatch.setattr("hpdm.patch.system.PatchDiffusion.configure", lambda self, config, changes: _old_config(about))
    same = {"patch": (2, 8, 8), "resolution": (8, 32, 32), "batch": 2, "warmup": 1, "lr": 1e-2, "steps": 4}
    same |= {"ema_decay": 0.5}
    options = train_options(data=clips, out=run, **same, kernels="torch", workers=0, log_every=1, device="cpu")
    train(options)
    assert [path.name for path in list_checkpoints(run)] == ["step-00000004"]
    resumed = json.loads((run / "config.json").read_text())
    assert (resumed["system"], resumed["training"]["boxes"]) == ("patch", "nested")
    with pytest.raises(ValueError, match=r"other options \(weight_decay: 0.01 -> 0.02\)"):
        train(train_options(data=clips, out=run, **same, weight_decay=0.02, kernels="torch", workers=0, device="cpu"))


def test_its_curve_can_be_trained_again(tmp_path, monkeypatch):
    """The same clips, boxes, times and noise: drawn as then, the losses of then."""
    about = json.loads((OLD / "run" / "config.json").read_text())
    clips = render_synthetic(tmp_path / "clips", clips=2, frames=12, size=(32, 32), classes=["RedDisc", "GreenSquare"])
    monkeypatch.setattr("hpdm.patch.system.PatchDiffusion.configure", lambda self, config, changes: _old_config(about))
    same = {
        "patch": (2, 8, 8),
        "resolution": (8, 32, 32),
        "batch": 2,
        "warmup": 1,
        "lr": 1e-2,
        "ema_decay": 0.5,
        "steps": 4,
        "optimizer": "adamw",
    }
    then_default = {"boxes": "nested", "draws": "micro-batch", "clean_context": 0.0}
    options = train_options(data=clips, out=tmp_path / "run", **same, **then_default, kernels="torch", workers=0,
                            log_every=1, device="cpu")  # fmt: skip
    train(options)
    then, now = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (OLD / "run", tmp_path / "run")
    )
    for name in ("loss", "loss_level_0", "loss_level_1", "loss_level_2"):
        assert [row[name] for row in now] == pytest.approx([row[name] for row in then], rel=1e-4)


def _old_config(about):
    return hpdm.HPDMConfig.from_dict(about["model"])
