"""Four processes as two nodes of two: they train as one does, keep gradients as shards, and share out what is saved."""

import functools
import json
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import hpdm.training.saving as saving
from hpdm import distributed, systems, tensor_file
from hpdm import runs as saved
from hpdm.commands.train import train
from hpdm.patch.model import HPDM
from hpdm.recipe import Recipe, RecipeChanges
from hpdm.training.checkpoint import list_checkpoints
from hpdm.training.ema import EMA, PowerLaw
from hpdm.training.optim import make_optimizer
from hpdm.training.parallel import shard, shard_size
from hpdm.training.step import update
from hpdm.training.trainer import Trainer
from tests.processes import run_ranks
from tests.small import small_config, stop_after_checkpoint, train_options

PATCH = systems.get("patch")
RUNS = ["adamw_selective", "lamb_block", "lamb_delayed", "lamb_turns"]


def options(clips, out, **changes):
    """Of eight micro-batches each of four processes accumulates two."""
    values = {"steps": 3, "batch": 8, "micro_batch": 1, "save_every": 1, "optimizer": "lamb", "lr": 5e-3, "keep": 0}
    return train_options(clips, out, **(values | {"ema": (0.25, 0.1), "device": "cpu"} | changes))


def stopped(given, step):
    """Trains until the checkpoint of ``step`` is complete."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after_checkpoint(step, patch)
        with pytest.raises(KeyboardInterrupt):
            train(given)


def train_in_a_group(clips, out):
    """What each of four processes does."""
    clips, out = Path(clips), Path(out)
    with distributed.process_group(torch.device("cpu")):
        train(options(clips, out / "adamw_selective", parallel="hsdp", optimizer="adamw", recompute="selective"))
        followed = {"validate_every": 2, "validation": clips, "snapshot_every": 2, "sample_every": 2}
        train(options(clips, out / "lamb_block", parallel="hsdp", recompute="block", **followed, sample_steps=1))
        # After a step of one process.
        stopped(options(clips, out / "lamb_turns", parallel="hsdp", shard_ranks=2), 2)
        train(options(clips, out / "lamb_turns", parallel="ddp"))
        save_beside_training(clips, out)
        accumulate(out)
        refuse(clips, out)


def save_beside_training(clips, out):
    """The threads that write step 1 wait until step 2 is under way; later one process finds its disk full."""
    going_on = threading.Event()
    real_write, real_step, real_save = saving.write_checkpoint, Trainer.train_step, tensor_file.save_file

    def write(run, step, *rest):
        if step == 1 and not going_on.wait(60):
            raise TimeoutError("training waits for what is written")
        return real_write(run, step, *rest)

    def train_step(self, batches):
        if self.step == 1:
            going_on.set()
        return real_step(self, batches)

    def full(tensors, path, metadata):
        if "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        real_save(tensors, path, metadata)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", write)
        patch.setattr(Trainer, "train_step", train_step)
        train(options(clips, out / "lamb_delayed", parallel="fsdp"))
    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == 2:
            patch.setattr(tensor_file, "save_file", full)
        with pytest.raises((OSError, RuntimeError), match="No space left"):
            train(options(clips, out / "full", parallel="hsdp"))


def accumulate(out):
    """Three micro-batches, sharded over all four processes and over two times two; what is held between them."""
    for name, size in (("fsdp", (4,)), ("hsdp", (2, 2))):
        torch.manual_seed(0)
        model = HPDM(small_config(), recompute="selective")
        shard(PATCH, model, init_device_mesh("cpu", size, mesh_dim_names=("replicate", "shard")[-len(size) :]))
        inputs = PATCH.example_inputs(model.config, 1)
        held = []

        def losses(model=model, inputs=inputs, held=held):
            held.append(gradients_of(model))
            return model(**inputs).add(1).square().mean()

        optimizer = make_optimizer(model, "adamw", 1e-3, 0.0)
        update(model, optimizer, EMA(model, PowerLaw(0.05)), [losses] * 3)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        # What is looked at sees whole gradients where they are kept.
        model.set_requires_gradient_sync(False)
        losses().backward()
        held[-1] = gradients_of(model)
        (out / f"{name}_{distributed.rank()}.json").write_text(json.dumps([weights, held]))


def gradients_of(model):
    """Number of the gradients that this rank holds whole, though weights are sharded, and the bytes of its shards."""
    whole = shards = 0
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        group = module._get_fsdp_state()._fsdp_param_group
        if group._partial_reduce_output is not None:
            shards += group._partial_reduce_output.nbytes
        for p in group.fsdp_params:
            unsharded = getattr(p, "_unsharded_param", None)
            whole += p.unsharded_accumulated_grad is not None or (unsharded is not None and unsharded.grad is not None)
            grad = p.sharded_param.grad
            if grad is not None:
                assert isinstance(grad, DTensor)
                assert grad.to_local().shape == p.sharded_param.to_local().shape
                shards += grad.to_local().nbytes
    return whole, shards


def refuse(clips, out):
    """Numbers of processes that cannot be."""
    for number, changes in enumerate(({"shard_ranks": 3}, {"parallel": "fsdp", "shard_ranks": 2})):
        with pytest.raises(ValueError, match="shard_ranks") as error:
            train(options(clips, out / "wrong", **({"parallel": "hsdp"} | changes)))
        (out / f"error_{number}_{distributed.rank()}").write_text(str(error.value))


@pytest.fixture(scope="module")
def runs(clips, tmp_path_factory):
    """One process alone with either optimizer, and what four processes train."""
    out = tmp_path_factory.mktemp("hsdp")
    for optimizer in ("adamw", "lamb"):
        train(options(clips, out / f"{optimizer}_alone", optimizer=optimizer))
    stopped(options(clips, out / "lamb_turns"), 1)
    run_ranks(train_in_a_group, 4, clips, out, LOCAL_WORLD_SIZE="2")
    return out


@functools.cache
def tensors(run, weights):
    """A run's or checkpoint's weights by name."""
    return {name: p.detach() for name, p in saved.load(run, weights=weights).model.named_parameters()}


def rows(run):
    return [row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_losses_are_those_of_one_process(runs, name):
    """Within the budgets of the tests with two processes: weights and averages to 1 % of their last step."""
    alone = runs / f"{name.partition('_')[0]}_alone"
    expected, got = rows(alone), rows(runs / name)
    assert [row["step"] for row in got] == [1, 2, 3]
    for key in ("loss", "loss_level_0", "loss_level_2", "grad_norm", "update_norm_latent_layers"):
        assert [row[key] for row in got] == pytest.approx([row[key] for row in expected], rel=1e-4), key
    for weights in ("model", "ema-0.10"):
        before, after = (tensors(path, weights) for path in list_checkpoints(alone)[-2:])
        trained = tensors(runs / name, weights)
        for key, value in after.items():
            moved = (value - before[key]).norm()
            assert moved > 0, key
            assert (trained[key] - value).norm() <= 0.01 * moved, (weights, key)


def test_validations_samples_and_snapshots_are_there(runs):
    run = runs / "lamb_block"
    assert [row["step"] for row in map(json.loads, (run / "log.jsonl").open()) if "validation" in row] == [2, 3]
    average, snapshot = (
        saved.load(path).model.parameters()
        for path in (list_checkpoints(run)[-1], run / "snapshots" / "step-00000003.safetensors")
    )
    assert all(torch.equal(p, q) for p, q in zip(average, snapshot))
    assert (run / "samples" / "step-00000002.png").stat().st_size > 0


def test_each_number_is_saved_by_one_of_four(runs):
    """Replicas write shards in turns, so that each of the four processes writes about a quarter."""
    for part in ("model", "ema", "ema-0.100", "optimizer"):
        folder = list_checkpoints(runs / "lamb_block")[-1] / part
        files = sorted(folder.iterdir())
        assert [file.name[:11] for file in files] == [f"shard-0000{rank}" for rank in (1, 2, 3, 4)]
        sizes = [file.stat().st_size for file in files]
        assert max(sizes) < 1.2 * min(sizes)
        counts = {}
        for file in files:
            with safe_open(file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    counts[key] = counts.get(key, 0) + math.prod(stored.get_slice(key).get_shape())
        whole = {name: p.numel() for name, p in saved.load(runs / "lamb_alone").model.named_parameters()}
        if part == "optimizer":
            moments = ("exp_avg", "exp_avg_sq")
            whole = {f"{n}.{key}": number for n, number in whole.items() for key in moments} | {
                f"{n}.step": 1 for n in whole
            }
        assert counts == whole


def test_wrong_numbers_are_named(runs, monkeypatch):
    for rank in range(4):
        assert (runs / f"error_0_{rank}").read_text() == (
            "shard_ranks: got 3, expected a divisor of the number of processes, 4"
        )
        assert "got 2 with parallel='fsdp', expected 'hsdp'" in (runs / f"error_1_{rank}").read_text()
    assert not (runs / "wrong").exists()
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="shard_ranks: got none, and torchrun's LOCAL_WORLD_SIZE is not set"):
        shard_size("hsdp", 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [shard_size(how, 64) for how in ("ddp", "fsdp", "hsdp")] == [1, 64, 8]
    assert shard_size("hsdp", 1) == 1


def test_another_way_of_sharding_drops_the_number():
    recipe = Recipe(parallel="hsdp", shard_ranks=2)
    assert RecipeChanges(steps=5).applied_to(recipe).shard_ranks == 2
    assert RecipeChanges(parallel="fsdp").applied_to(recipe).shard_ranks is None


@pytest.mark.parametrize(("name", "ranks"), [("fsdp", 4), ("hsdp", 2)])
def test_no_whole_gradient_lives_between_micro_batches(runs, name, ranks):
    for rank in range(4):
        weights, (*held, kept) = json.loads((runs / f"{name}_{rank}.json").read_text())
        assert [whole for whole, _ in held] == [0, 0, 0]
        assert held[0][1] == 0
        for _, shards in held[1:]:
            # Shards are padded to the same length on all ranks.
            assert 0.9 * weights / ranks < shards < 1.2 * weights / ranks
        assert kept[0] > 0


def test_training_goes_on_while_all_write(runs):
    """The checkpoint that was written a step late has the weights of its own step."""
    late = tensors(list_checkpoints(runs / "lamb_delayed")[0], "model")
    expected, after = (tensors(path, "model") for path in list_checkpoints(runs / "lamb_alone")[:2])
    for key, value in expected.items():
        assert (late[key] - value).norm() <= 0.01 * (after[key] - value).norm(), key


def test_a_full_disk_on_one_process_leaves_what_is_complete(runs):
    assert os.listdir(runs / "full" / "checkpoints") == ["step-00000001"]
