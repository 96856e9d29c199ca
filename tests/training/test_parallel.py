"""Two processes train as one does: replicated or sharded, whole or resumed, and fail together."""

import json
from pathlib import Path

import pytest
import torch

from hpdm import distributed
from hpdm import runs as saved
from hpdm.commands.train import train
from hpdm.evaluation import validation
from hpdm.training.checkpoint import list_checkpoints
from tests.processes import run_ranks
from tests.small import stop_after_checkpoint, train_options

RECOMPUTING = {"ddp_selective": "ddp", "fsdp_selective": "fsdp", "fsdp_block": "fsdp"}
RUNS = ["ddp", "fsdp", *RECOMPUTING, "resumed_by_two", "resumed_by_one"]


def options(clips, out, **changes):
    values = {"steps": 3, "batch": 4, "micro_batch": 2, "save_every": 1, "optimizer": "lamb", "lr": 5e-3}
    values |= {"ema": (0.25, 0.1), "device": "cpu"}
    return train_options(clips, out, **(values | changes))


def followed(clips, out, **changes):
    return options(clips, out, validate_every=2, validation=clips, snapshot_every=2, **changes)


def validate_in_three_batches(monkeypatch):
    """Of the six clips two at a time, which two processes cannot share out evenly."""
    monkeypatch.setattr(validation, "BATCH", 2)


def train_in_a_group(clips, out):
    """What each of two processes does: runs from start to end, the second half of one, the first half of another."""
    clips, out = Path(clips), Path(out)
    errors = []
    with distributed.process_group(torch.device("cpu")), pytest.MonkeyPatch.context() as batches:
        validate_in_three_batches(batches)
        rank = distributed.rank()
        for how in ("ddp", "fsdp"):
            train(followed(clips, out / how, parallel=how))
        for name, how in RECOMPUTING.items():
            train(options(clips, out / name, parallel=how, recompute=name.removeprefix(f"{how}_")))
        train(options(clips, out / "resumed_by_two", parallel="fsdp"))
        with pytest.MonkeyPatch.context() as patch:
            stop_after_checkpoint(1, patch)
            with pytest.raises(KeyboardInterrupt):
                train(options(clips, out / "resumed_by_one", parallel="fsdp"))
        for changes in (
            {"lr": 5e-3 + rank},
            {"data": clips if rank == 0 else clips / "nowhere"},
            {"batch": 6, "micro_batch": 2},
            {"preset": "hpdm_t2v", "patch": None, "resolution": None},
        ):
            with pytest.raises((ValueError, FileNotFoundError, RuntimeError)) as error:
                train(options(clips, out / "wrong", **changes))
            errors.append(f"{type(error.value).__name__}: {error.value}")
    (out / f"errors_{rank}").write_text("\n".join(errors))


@pytest.fixture(scope="module")
def runs(clips, tmp_path_factory):
    """One process alone, two replicated, two sharded; runs that each leaves to the others to finish."""
    out = tmp_path_factory.mktemp("parallel")
    alone = pytest.MonkeyPatch()
    validate_in_three_batches(alone)
    train(followed(clips, out / "alone"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after_checkpoint(1, patch)
        with pytest.raises(KeyboardInterrupt):
            train(options(clips, out / "resumed_by_two"))
    run_ranks(train_in_a_group, 2, clips, out)
    train(options(clips, out / "resumed_by_one"))
    alone.undo()
    return out


def rows(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("weights", ["model", "ema", "ema-0.10"])
def test_weights_and_their_average_do_not_depend_on_the_processes(runs, name, weights):
    """To 1 % of what each moved in the last step: the optimizer makes a step of rounding errors where it divides them
    by themselves, but a shard that is not averaged, or not followed, is off by all of it.
    """
    expected, got = (dict(saved.load(runs / run, weights=weights).model.named_parameters()) for run in ("alone", name))
    before = list_checkpoints(runs / "alone")[-2]
    before = dict(saved.load(before, weights=weights).model.named_parameters())
    for key, value in expected.items():
        moved = (value - before[key]).norm()
        assert moved > 0, key
        assert (got[key] - value).norm() <= 0.01 * moved, key


@pytest.mark.parametrize("name", RUNS)
def test_losses_do_not_depend_on_the_processes(runs, name):
    expected, got = ([row for row in rows(runs / run) if "loss" in row] for run in ("alone", name))
    assert [row["step"] for row in got] == [1, 2, 3]
    for key in (
        "loss", "loss_level_0", "loss_level_2", "grad_norm", "grad_norm_max", "weight_norm_latent_layers",
        "update_norm_latent_layers", "update_norm_conditioning", "trust_min", "trust_median", "trust_max",
    ):  # fmt: skip
        assert [row[key] for row in got] == pytest.approx([row[key] for row in expected], rel=1e-4), key


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_validations_and_snapshots_do_not_depend_on_the_processes(runs, name):
    expected, got = ([row for row in rows(runs / run) if "validation" in row] for run in ("alone", name))
    assert [row["step"] for row in got] == [2, 3]
    for ours, theirs in zip(got, expected):
        assert ours.keys() == theirs.keys()
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    for step in (2, 3):
        file = f"snapshots/step-{step:08d}.safetensors"
        whole, shared = (saved.load(runs / run / file).model.parameters() for run in ("alone", name))
        assert all(torch.allclose(p, q, rtol=1e-3, atol=1e-6) for p, q in zip(whole, shared))


def test_checkpoints_are_shared_out(runs):
    files = (list_checkpoints(runs / "fsdp")[-1] / "ema").iterdir()
    sizes = [file.stat().st_size for file in files]
    assert len(sizes) == 2
    assert max(sizes) < 1.2 * min(sizes)


def test_errors_reach_every_process(runs):
    errors = [(runs / f"errors_{rank}").read_text().splitlines() for rank in range(2)]
    assert errors[0][0] == errors[1][0]
    assert errors[0][0] == "ValueError: options: recipe: lr: process 1 got 1.005, expected 0.005 as in process 0"
    assert errors[0][1].startswith("ValueError: options: data: process 1 got")
    for rank in range(2):
        assert errors[rank][2].startswith("ValueError: batch: got 6, expected a multiple of 2 process(es) times")
        assert "conditioned on text" in errors[rank][3]
    assert not (runs / "wrong").exists()
