"""What is drawn for a sample depends on the seed and on its place in the run, not on who draws it with which others."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hpdm import distributed
from hpdm.commands.train import prepare, train
from hpdm.objective import Objective
from hpdm.patch.draws import draw
from hpdm.training.batches import MicroBatches, noise_generator
from hpdm.training.trainer import Trainer
from tests.processes import run_ranks
from tests.small import change_config, small_config
from tests.small import train_options as options

CONFIG = small_config(self_conditioning=0.5)
OBJECTIVE = Objective("logit-normal", low_discrepancy=True, weighting="min-snr", clean_context=0.5, flip=True)
EVERYTHING = {"objective": OBJECTIVE, "dropout": 0.5, "images": 0.5}
IN_A_RUN = {"low_discrepancy": True, "clean_context": 0.5, "flip": True, "images": 0.5, "self_conditioning": 0.5}


def drawn(batch, rows=None, seed=3, **changes):
    return draw(CONFIG, batch, torch.Generator().manual_seed(seed), **(EVERYTHING | changes), rows=rows)


def joined(parts):
    """Draws of several micro-batches as if they were one."""
    fields = {n: [getattr(p, n) for p in parts] for n in parts[0]._fields}
    return parts[0]._make(
        None if values[0] is None else values[0] if n == "signal" else torch.cat(values) for n, values in fields.items()
    )


def assert_equal(first, second):
    for name, a, b in zip(first._fields, first, second):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("objective", [OBJECTIVE, Objective(cuts=True)], ids=["all", "cuts"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_are_the_same_whichever_are_drawn_together(size, objective):
    whole = drawn(8, range(8), objective=objective)
    parts = [drawn(8, range(first, first + size), objective=objective) for first in range(0, 8, size)]
    assert_equal(joined(parts), whole)
    assert all(len(t) == size for n, t in parts[1]._asdict().items() if t is not None and n != "signal")


def test_everything_but_the_noise_is_that_of_the_whole_batch():
    """So shares that hold for a batch, of times and of stills, hold for the step."""
    rows, whole = drawn(8, range(8)), drawn(8)
    for name in ("boxes", "stills", "mirrored"):
        assert torch.equal(getattr(rows, name), getattr(whole, name)), name
    stills = [len(set(frames.tolist())) == 1 for frames in rows.stills]
    assert sum(stills) == 4
    quantiles = (drawn(8, range(8), objective=Objective(low_discrepancy=True)).t * 8).floor().sort(dim=0).values
    assert torch.equal(quantiles, torch.arange(8.0)[:, None].expand(8, 3))


def test_rows_and_steps_have_noise_of_their_own():
    noise = torch.cat([drawn(64, range(64), seed=seed).noise.flatten(1) for seed in (3, 4)])  # [128, n]
    n = noise.shape[1]
    assert noise.mean().abs() < 5 / (128 * n) ** 0.5
    assert noise.var().item() == pytest.approx(1, abs=5 * (2 / (128 * n)) ** 0.5)
    correlation = noise @ noise.T / n
    assert (correlation - torch.diag(correlation.diag())).abs().max() < 6.5 / n**0.5


def of_a_step(monkeypatch, clips, out, world_size, step, micro_batch):
    """Draws and clips of a step, of all ranks one after another."""
    job = prepare(options(clips, out, batch=8, micro_batch=micro_batch, **IN_A_RUN))
    draws, keys = [], []
    for rank in range(world_size):
        trainer = Trainer(job, torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            patch.setattr(distributed, "world_size", lambda: world_size)
            batches = MicroBatches(job.dataset, 8, micro_batch, job.options.seed)
        for number in batches.numbers(step):
            draws.append(trainer.draw(number))
            keys += batches.order.keys(number)
    return joined(draws), keys


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_a_step_is_the_same_on_any_number_of_ranks_in_any_micro_batches(
    clips, tmp_path, monkeypatch, world_size, micro_batch
):
    expected, clips_expected = of_a_step(monkeypatch, clips, tmp_path, 1, 5, 8)
    got, clips_got = of_a_step(monkeypatch, clips, tmp_path, world_size, 5, micro_batch)
    assert clips_got == clips_expected
    assert_equal(got, expected)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def train_as_a_rank(clips, out):
    train(options(Path(clips), Path(out), batch=4, steps=3, device="cpu", **IN_A_RUN))


def test_a_run_does_not_depend_on_the_processes_nor_on_micro_batches(clips, tmp_path):
    """Each with the micro-batch that it takes by itself, all of its share."""
    train_as_a_rank(clips, tmp_path / "one")
    run_ranks(train_as_a_rank, 2, clips, tmp_path / "two")
    train(options(clips, tmp_path / "single", batch=4, steps=3, micro_batch=1, workers=1, **IN_A_RUN))
    for name in ("two", "single"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_run_of_an_earlier_version_goes_on_with_its_own_draws(clips, saved_run, tmp_path):
    """Those of its micro-batches, by their number."""
    run = shutil.copytree(saved_run, tmp_path / "run")
    change_config(run, lambda stored: stored["training"].pop("draws"))
    job = prepare(options(clips, run, steps=8))
    assert job.options.objective.draws == "micro-batch"
    trainer = Trainer(job, torch.device("cpu"))
    config = job.config
    expected = draw(
        config, 3, noise_generator(0, 7), dropout=config.conditioning_dropout, objective=job.options.objective
    )
    assert_equal(trainer.draw(7), expected)
    with pytest.raises(ValueError, match="draws: micro-batch -> step"):
        prepare(options(clips, run, steps=8, draws="step"))
    with pytest.raises(ValueError, match="draws: got 'clip', expected"):
        Objective(draws="clip")
