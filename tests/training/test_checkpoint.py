"""Checkpoints are whole or absent."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import hpdm.training.checkpoint as ckpt
from hpdm import HPDM, runs, systems, tensor_file
from hpdm.runs import RunConfig
from hpdm.training.ema import EMA, ConstantDecay
from hpdm.training.optim import make_optimizer
from tests.small import small_config


def state(optimizer="adamw", seed=0, **changes):
    torch.manual_seed(seed)
    model = HPDM(small_config(**changes))
    ema, opt = EMA(model, ConstantDecay(0.9)), make_optimizer(model, optimizer, 1e-3, 0.01)
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
    real = tensor_file.save_file

    def full(tensors, path, metadata):
        if path.parent.name == fails_at:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(tensors, path, metadata)

    monkeypatch.setattr(tensor_file, "save_file", full)
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
    for name in (".step-00000002.0123.new", ".step-00000000.4567.old"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "state.json").write_bytes(b"half")
    assert [p.name for p in ckpt.list_checkpoints(tmp_path)] == ["step-00000001"]
    ckpt.save_checkpoint(tmp_path, 2, model, ema, opt)
    ckpt.remove_leftovers(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    path = ckpt.save_checkpoint(tmp_path, 1, *state())
    with pytest.raises(ValueError, match=r"of another config: .* has shape"):
        ckpt.load_checkpoint(path, HPDM(small_config().replace(latents=8)))
    with pytest.raises(ValueError, match=r"of another config: lacks"):
        ckpt.load_checkpoint(path, HPDM(small_config(latent_layers=2)))


def test_damage_is_named(tmp_path):
    model, ema, opt = state()
    path = ckpt.save_checkpoint(tmp_path, 1, model, ema, opt)
    (file,) = (path / "model").iterdir()
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"model/.*: damaged \(got \d+ bytes, expected \d+\)"):
        ckpt.load_checkpoint(path, model)
    file.write_bytes(b"\xff" * len(good))
    with pytest.raises(ValueError, match=r"model/.*: damaged \(its contents and their hash do not match\)"):
        ckpt.load_checkpoint(path, model)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"model/.* is missing"):
        ckpt.load_checkpoint(path, model)
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match=r"state.json: not JSON"):
        ckpt.load_checkpoint(path, model)
    for version, word in ((99, "a newer"), (1, "an older")):
        (path / "state.json").write_text(json.dumps({"format": version, "step": 1}))
        with pytest.raises(ValueError, match=rf"got format {version}, expected 3; it is from {word} version"):
            ckpt.load_checkpoint(path, model)


def test_an_exported_file_holds_all_that_sampling_needs(tmp_path):
    model, ema, opt = state()
    runs.save_run_config(tmp_path, RunConfig(systems.get("patch"), small_config(), ["a"] * 6, {"stride": 1}))
    ckpt.save_checkpoint(tmp_path, 5, model, ema, opt)
    assert runs.export(tmp_path, tmp_path / "out.safetensors") == 5
    loaded, _, names, training, step, _, _ = runs.load(tmp_path / "out.safetensors")
    assert (names, training, step, loaded.config) == (["a"] * 6, {"stride": 1}, 5, small_config())
    assert all(torch.equal(p, ema.shadow[n]) for n, p in loaded.named_parameters())
    with pytest.raises(ValueError, match="weights: got 'model', expected 'ema'"):
        runs.load(tmp_path / "out.safetensors", weights="model")
    with pytest.raises(ValueError, match=r"out: got 'out.pt'"):
        runs.export(tmp_path, tmp_path / "out.pt")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="without a config"):
        runs.load(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        runs.load(tmp_path / "other.safetensors")


def test_loading_a_run(tmp_path):
    model, ema, opt = state()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        runs.load(tmp_path)
    runs.save_run_config(tmp_path, RunConfig(systems.get("patch"), small_config(), ["a"] * 6, {"stride": 1}))
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint yet"):
        runs.load(tmp_path)
    path = ckpt.save_checkpoint(tmp_path, 5, model, ema, opt)
    loaded, _, names, training, step, _, _ = runs.load(tmp_path)
    assert (names, training, step) == (["a"] * 6, {"stride": 1}, 5)
    assert all(torch.equal(p, ema.shadow[n]) for n, p in loaded.named_parameters())
    raw = runs.load(path, weights="model").model
    assert all(torch.equal(p, q) for p, q in zip(raw.parameters(), model.parameters()))
    assert not loaded.training
    with pytest.raises(ValueError, match="weights: got 'best'"):
        runs.load(tmp_path, weights="best")
    shutil.rmtree(path)
