"""What counts as waiting for data, and how far ahead clips are read."""

import json
import time
from contextlib import contextmanager

import pytest
import torch

from hpdm.commands.train import prepare, train
from hpdm.training import batches
from hpdm.training.ahead import DrawnAhead
from hpdm.training.batches import MicroBatches, loader, prefetch_factor
from hpdm.training.fused import FusedOptimizer
from hpdm.training.log import Reports
from tests.small import train_options as options


def test_the_share_is_that_of_the_waits_since_the_last_row(tmp_path, monkeypatch):
    """On a clock that is set: 3 and 2 of 20 seconds, of which a validation took 10."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    reports = Reports(tmp_path, "jsonl", 0, 2, 4)
    for seconds in (3, 2):
        with reports.waiting():
            now[0] += seconds
        reports.step()
    with reports.paused():
        now[0] += 10
    now[0] += 5
    reports.write({"step": 2, "loss": 1.0})
    now[0] += 1
    reports.step()
    reports.write({"step": 3, "loss": 1.0})
    first, second = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["data_share"], first["clips_per_s"]) == (0.5, 0.8)
    assert (second["data_share"], second["clips_per_s"]) == (0.0, 4.0)


def test_waits_for_clips_and_for_draws_count_and_no_others(clips, tmp_path, monkeypatch):
    waiting, calls = [False], []

    @contextmanager
    def noted(self):
        waiting[0] = True
        yield
        waiting[0] = False

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*arguments, **options):
            calls.append((name, waiting[0]))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(Reports, "waiting", noted)
    watch(DrawnAhead, "take")
    watch(batches, "collate")
    watch(FusedOptimizer, "step_with")
    train(options(clips, tmp_path, steps=2, micro_batch=1))
    assert calls == 2 * [*3 * [("collate", True)], ("take", True), ("step_with", False)]


def test_draws_are_begun_before_clips_are_read(clips, tmp_path, monkeypatch):
    calls = []
    real_begin, real_collate = DrawnAhead.begin, batches.collate
    monkeypatch.setattr(DrawnAhead, "begin", lambda self, n: calls.append(tuple(n)) or real_begin(self, n))
    monkeypatch.setattr(batches, "collate", lambda *a, **o: calls.append("clips") or real_collate(*a, **o))
    train(options(clips, tmp_path, steps=2, micro_batch=3))
    # The second step's are begun with the first step, and taken as they are.
    assert calls == [(0,), "clips", (0, 1), (1,), "clips", (1,)]


@pytest.mark.parametrize(
    ("per_step", "workers", "batch_bytes", "expected"),
    [
        (1, 1, 100, 2),  # two are PyTorch's own number
        (8, 1, 100, 8),
        (8, 3, 100, 3),
        (96, 8, 12_582_912, 10),  # 85 clips of 64x256x256 pixels are 1 GB
        (96, 1, 12_582_912, 85),
        (8, 2, 2**30, 2),
    ],
)
def test_a_step_is_read_ahead_as_far_as_memory_allows(per_step, workers, batch_bytes, expected):
    assert prefetch_factor(per_step, workers, batch_bytes) == expected


def test_the_loader_asks_for_a_whole_step_ahead(clips, tmp_path, monkeypatch):
    job = prepare(options(clips, tmp_path, batch=6, micro_batch=1))
    micro, asked = MicroBatches(job.dataset, 6, 1, 0), []
    real = micro.order.keys
    monkeypatch.setattr(micro.order, "keys", lambda number: asked.append(number) or real(number))
    clips_ahead = loader(job.dataset, micro, 1, torch.device("cpu"), batch_bytes=8 * 3 * 32 * 32)
    next(clips_ahead)
    assert asked == list(range(1 + 6))
    clips_ahead.close()
