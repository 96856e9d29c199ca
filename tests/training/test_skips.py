"""Numbers that are not finite: their steps are skipped and counted, and nothing of them is applied or saved."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import hpdm.training.step as step_module
from hpdm import runs
from hpdm.commands.train import train
from hpdm.patch.system import PatchDiffusion
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.trainer import Trainer
from tests.processes import run_ranks
from tests.small import train_options as options


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def tensors_of(checkpoint):
    return {f"{file.parent.name}/{name}": t for file in checkpoint.glob("*/*") for name, t in load_file(file).items()}


def break_losses(monkeypatch, steps, how="loss"):
    """Makes the losses of these steps, counted from 1, NaN, or finite with a gradient that is not."""
    real, calls = PatchDiffusion.losses, []

    def broken(*arguments, **options):
        calls.append(1)
        losses = real(*arguments, **options)
        if len(calls) not in steps:
            return losses
        if how == "loss":
            return {name: loss * math.nan for name, loss in losses.items()}
        return {name: loss + (loss - loss.detach()).sqrt() for name, loss in losses.items()}

    monkeypatch.setattr(PatchDiffusion, "losses", broken)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(clips, tmp_path, monkeypatch, caplog, how):
    break_losses(monkeypatch, {4}, how)
    train(options(clips, tmp_path, save_every=1, keep=0, log_every=3))
    before, after, next_one = (tensors_of(list_checkpoints(tmp_path)[n]) for n in (2, 3, 4))
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert not all(torch.equal(t, next_one[name]) for name, t in before.items())
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1]
    assert all(math.isfinite(value) for row in rows(tmp_path) for value in row.values())
    assert "step 4 is skipped: the norm of its gradient is not finite" in caplog.text


def test_a_row_of_skipped_steps_alone_has_no_means(clips, tmp_path, monkeypatch):
    break_losses(monkeypatch, {3, 4})
    train(options(clips, tmp_path, log_every=2))
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 2, 0]
    assert ["loss" in row for row in rows(tmp_path)] == [True, False, True]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_too_many_in_a_row_end_the_run_with_good_checkpoints(clips, tmp_path, monkeypatch, how):
    """Also where the log is written less often than checkpoints are. The same command then goes on."""
    break_losses(monkeypatch, {3, 4, 5}, how)
    match = "the norm of the gradient is not finite at the 3 steps up to 5; the last checkpoint is of step 4. Lower"
    with pytest.raises(FloatingPointError, match=match):
        train(options(clips, tmp_path, log_every=6, save_every=2, snapshot_every=2, max_skipped=3))
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000004"]
    for checkpoint in list_checkpoints(tmp_path):
        assert all(t.isfinite().all() for t in tensors_of(checkpoint).values())
    monkeypatch.undo()
    train(options(clips, tmp_path, log_every=6, save_every=2, snapshot_every=2, max_skipped=3))
    assert runs.load(tmp_path).step == 6


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_broken_numbers_are_never_saved(clips, tmp_path, monkeypatch, part):
    """However they came into the weights: here by a fault of the machine after step 3."""
    real = Trainer._after_step

    def after_step(self, *arguments):
        if self.step == 4:
            name, p = list(self.model.named_parameters())[5]
            with torch.no_grad():
                target = {"model": p, "ema": self.ema.shadow[name], "optimizer": self.optimizer.state[p]["exp_avg"]}
                target[part].view(-1)[-1] = math.inf
        real(self, *arguments)

    monkeypatch.setattr(Trainer, "_after_step", after_step)
    match = rf"{part}/.* holds numbers that are not finite after step 4; the last checkpoint is of step 2"
    with pytest.raises(FloatingPointError, match=match):
        train(options(clips, tmp_path, save_every=2, keep=1))
    assert names(tmp_path / "checkpoints") == ["step-00000002"]
    monkeypatch.undo()
    train(options(clips, tmp_path, save_every=2, keep=1))
    assert runs.load(tmp_path).step == 6


def _train_with_a_nan_on_one_rank(clips, out, parallel):
    from pathlib import Path

    from hpdm import distributed

    real, steps = step_module.gradient_norm, []

    def norm(network):
        steps.append(1)
        if len(steps) == 2 and distributed.rank() == 1:
            grad = list(network.parameters())[3].grad
            (grad.to_local() if hasattr(grad, "to_local") else grad).view(-1)[0] = math.nan
        return real(network)

    step_module.gradient_norm = norm
    train(options(Path(clips), Path(out), batch=4, micro_batch=2, parallel=parallel, steps=4, save_every=1, keep=0))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_ranks_skip_a_step_together(clips, tmp_path, parallel):
    """One number of one gradient, after the ranks have exchanged them, on one of two ranks."""
    run_ranks(_train_with_a_nan_on_one_rank, 2, clips, tmp_path, parallel)
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1, 0, 0]
    first, second, third = (tensors_of(path) for path in list_checkpoints(tmp_path)[:3])
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    assert not all(torch.equal(t, third[name]) for name, t in first.items())
    assert all(t.isfinite().all() for t in third.values())
