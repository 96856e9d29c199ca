"""Checkpoints are whole or absent."""

import json
import shutil

import pytest
import torch

import hpdm.checkpoint as ckpt
from hpdm import HPDM, presets
from hpdm.optim import EMA, make_optimizer


def small(**changes):
    return presets.tiny().replace(
        patch=(2, 8, 8), width=16, latents=4, latent_width=16, head_width=16, conditioning_width=16, **changes
    )


def state(optimizer="adamw", seed=0, **changes):
    torch.manual_seed(seed)
    model = HPDM(small(**changes))
    ema, opt = EMA(model, 0.9), make_optimizer(model, optimizer, 1e-3, 0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    ema.update(model)
    return model, ema, opt


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_checkpoint_gives_back_everything(tmp_path, optimizer):
    model, ema, opt = state(optimizer)
    path = ckpt.save_checkpoint(tmp_path, 7, model, ema, opt)
    other, other_ema, other_opt = state(optimizer, seed=1)
    assert ckpt.load_checkpoint(path, other, other_ema, other_opt) == 7
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(p, q), name
        assert torch.equal(ema.shadow[name], other_ema.shadow[name]), name
        for key, value in opt.state[p].items():
            assert torch.equal(value, other_opt.state[q][key]), (name, key)
    assert other_ema.updates == ema.updates == 1


def test_only_the_newest_are_kept(tmp_path):
    model, ema, opt = state()
    for step in (10, 20, 30):
        ckpt.save_checkpoint(tmp_path, step, model, ema, opt, keep=2)
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("fails_at", ["model", "ema", "optimizer"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, fails_at):
    model, ema, opt = state()
    ckpt.save_checkpoint(tmp_path, 1, model, ema, opt)
    real = ckpt._save_tensors

    def full(tensors, path):
        if path.name.startswith(fails_at):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(ckpt, "_save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        ckpt.save_checkpoint(tmp_path, 2, model, ema, opt)
    monkeypatch.undo()
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == ["step-00000001"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    other = state(seed=1)
    assert ckpt.load_checkpoint(ckpt.list_checkpoints(tmp_path)[-1], *other) == 1


def test_a_killed_process_leaves_a_folder_that_is_no_checkpoint(tmp_path):
    model, ema, opt = state()
    ckpt.save_checkpoint(tmp_path, 1, model, ema, opt)
    partial = tmp_path / "checkpoints" / ".step-00000002.tmp"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == ["step-00000001"]
    ckpt.save_checkpoint(tmp_path, 2, model, ema, opt)
    assert not partial.exists()


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    path = ckpt.save_checkpoint(tmp_path, 1, *state())
    with pytest.raises(ValueError, match=r"of another config: .* has shape"):
        ckpt.load_checkpoint(path, HPDM(small().replace(latents=8)))
    with pytest.raises(ValueError, match=r"of another config: lacks"):
        ckpt.load_checkpoint(path, HPDM(small(latent_layers=2)))


def test_damage_is_named(tmp_path):
    model, ema, opt = state()
    path = ckpt.save_checkpoint(tmp_path, 1, model, ema, opt)
    good = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        ckpt.load_checkpoint(path, model)
    (path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing"):
        ckpt.load_checkpoint(path, model)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state.json: not JSON"):
        ckpt.load_checkpoint(path, model)
    (path / "state.json").write_text(json.dumps({"format": 99, "step": 1}))
    with pytest.raises(ValueError, match=r"newer version"):
        ckpt.load_checkpoint(path, model)


def test_loading_a_run(tmp_path):
    model, ema, opt = state()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        ckpt.load_model(tmp_path)
    ckpt.save_run_config(tmp_path, small(), ["a"] * 6, {"stride": 1})
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint yet"):
        ckpt.load_model(tmp_path)
    path = ckpt.save_checkpoint(tmp_path, 5, model, ema, opt)
    loaded, names, training, step = ckpt.load_model(tmp_path)
    assert (names, training, step) == (["a"] * 6, {"stride": 1}, 5)
    assert all(torch.equal(p, ema.shadow[n]) for n, p in loaded.named_parameters())
    raw = ckpt.load_model(path, weights="model")[0]
    assert all(torch.equal(p, q) for p, q in zip(raw.parameters(), model.parameters()))
    assert not loaded.training
    with pytest.raises(ValueError, match="weights: got 'best'"):
        ckpt.load_model(tmp_path, weights="best")
    shutil.rmtree(path)
