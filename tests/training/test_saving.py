"""A run is saved beside its training: what is written is what was there, errors are told, nothing bad is kept."""

import json
import logging
import threading

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import hpdm.training.saving as saving
from hpdm import runs, tensor_file
from hpdm.commands.train import train
from hpdm.training.background import Background, HostCopy
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.trainer import Trainer
from tests.small import train_options as options


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_while_a_checkpoint_is_written(clips, saved_run, tmp_path, monkeypatch):
    """The writer of step 3 waits until step 5 is under way, and still writes the weights of step 3."""
    going_on, went_on = threading.Event(), []
    real_write, real_step = saving.write_checkpoint, Trainer.train_step

    def write(run, step, *rest):
        if step == 3:
            went_on.append(going_on.wait(60))
        return real_write(run, step, *rest)

    def train_step(self, batches):
        if self.step == 4:
            going_on.set()
        return real_step(self, batches)

    monkeypatch.setattr(saving, "write_checkpoint", write)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    train(options(clips, tmp_path))
    assert went_on == [True]
    for expected, got in zip(list_checkpoints(saved_run), list_checkpoints(tmp_path)):
        assert expected.name == got.name
        for part in ("model", "ema", "optimizer"):
            ((a,), (b,)) = ((folder / part).iterdir() for folder in (expected, got))
            stored, written = load_file(a), load_file(b)
            assert list(stored) == list(written)
            assert all(torch.equal(t, written[name]) for name, t in stored.items()), (got.name, part)


def test_checkpoints_are_kept_as_asked_and_snapshots_for_ever(clips, saved_run, tmp_path):
    train(options(clips, tmp_path / "three", save_every=1, keep=3, snapshot_every=4, snapshot_precision="fp16"))
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "three")] == ["4", "5", "6"]
    assert names(tmp_path / "three" / "snapshots") == ["step-00000004.safetensors", "step-00000006.safetensors"]
    file = tmp_path / "three" / "snapshots" / "step-00000006.safetensors"
    run = runs.load(file)
    assert (run.step, run.classes, run.training["steps"]) == (6, ["RedDisc", "GreenSquare"], 6)
    (tmp_path / "ordinary").touch()
    assert file.stat().st_mode == (tmp_path / "ordinary").stat().st_mode  # for the group to read, if others are
    for p, q in zip(run.model.parameters(), runs.load(saved_run).model.parameters()):
        assert torch.equal(p, q.half().float())
    with safe_open(file, "pt") as stored:
        assert {stored.get_tensor(key).dtype for key in stored.keys()} == {torch.float16}  # noqa: SIM118
    train(options(clips, tmp_path / "all", save_every=2, keep=0))
    assert [path.name[-1] for path in list_checkpoints(tmp_path / "all")] == ["2", "4", "6"]
    train(options(clips, tmp_path / "all", save_every=3, keep=1))  # both may change when a run is resumed


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_snapshot_folder_stops_the_run_by_name(clips, tmp_path, monkeypatch, kind):
    real = tensor_file.save_file

    def full(tensors, path, metadata):
        if "snapshots" not in path.parts:
            return real(tensors, path, metadata)
        path.write_bytes(b"half")
        raise kind

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match=r"snapshots: .*/snapshots cannot take the weights of step 2 \(.*No space left"):
        train(options(clips, tmp_path, save_every=2, snapshot_every=2))
    assert names(tmp_path / "snapshots") == []
    assert names(tmp_path / "checkpoints") == ["step-00000002"]
    monkeypatch.undo()
    average = runs.load(tmp_path).model
    train(options(clips, tmp_path, save_every=2, snapshot_every=2))
    late = runs.load(tmp_path / "snapshots" / "step-00000002.safetensors").model
    assert all(torch.equal(p, q) for p, q in zip(late.parameters(), average.parameters()))
    assert names(tmp_path / "snapshots") == [f"step-0000000{step}.safetensors" for step in (2, 4, 6)]


def test_a_file_in_the_way_of_snapshots_is_named(clips, tmp_path):
    (tmp_path / "snapshots").write_text("")
    with pytest.raises(OSError, match=r"snapshots: .* cannot take the weights of step 1 \(.*File exists"):
        train(options(clips, tmp_path, steps=1, snapshot_every=1))


def test_background_work_is_done_one_at_a_time_and_its_errors_are_raised(caplog):
    order, first_may_end = [], threading.Event()
    background = Background()
    background.start(lambda: (first_may_end.wait(60), order.append(1)))
    background.check()  # does not wait
    assert order == []
    threading.Timer(0.05, first_may_end.set).start()
    background.start(lambda: order.append(2))
    background.wait()
    assert order == [1, 2]

    def fail():
        raise OSError("no space")

    background.start(fail)
    with pytest.raises(OSError, match="no space"):
        background.start(lambda: order.append(3))
    assert order == [1, 2]
    with pytest.raises(OSError, match="no space"), background:
        background.start(fail)

    def fail_twice():
        with background:
            background.start(fail)
            raise KeyError("another")

    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="another"):
        fail_twice()
    assert "no space" in caplog.text
    background.check()  # told once


def test_host_copies_do_not_follow_their_tensors(generator):
    tensors = {"a": torch.randn(3, 5, generator=generator), "b": torch.tensor(2.0), "c": torch.arange(4)}
    before = {name: t.clone() for name, t in tensors.items()}
    copy = HostCopy()
    copies = copy.copy(tensors)
    for t in tensors.values():
        t.add_(1)
    copy.wait()
    assert all(torch.equal(copies[name], before[name]) and copies[name].dtype == t.dtype for name, t in tensors.items())
    again = copy.copy(tensors)
    assert again["a"].data_ptr() == copies["a"].data_ptr()  # buffers are used again
    assert torch.equal(again["a"], tensors["a"])


def test_a_whole_checkpoint_has_the_layout_of_a_sharded_one(saved_run):
    (file,) = (list_checkpoints(saved_run)[-1] / "model").iterdir()
    with safe_open(file, "pt") as stored:
        about = stored.metadata()
        offsets = json.loads(about["DCP_SHARDING_INFO"])
        assert about["DCP_VERSION"] == "1.0"
        shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
    assert {name: len(shape) for name, shape in shapes.items()} == {
        name: len(where["saved_offsets"]) for name, where in offsets.items()
    }
