"""Workers that are killed at random moments, one or all at once, while they start or work: every batch is the same.

About 30 kills run by default; with ``HPDM_SOAK=all`` there are 200 of each kind.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import pin_memory

from hpdm.commands.train import train
from hpdm.data import loader
from hpdm.data.clips import VideoDataset
from hpdm.data.order import ClipOrder
from hpdm.training.batches import collate
from tests.small import train_options

SOAK = os.environ.get("HPDM_SOAK") == "all"
KILLS = 200 if SOAK else 4


class Noise(Dataset):
    """Items that are a function of their key, as clips are, and take up to 4 ms."""

    def __getitem__(self, key):
        time.sleep(random.random() * 0.004)
        made = torch.Generator().manual_seed(1000 * key.epoch + key.clip)
        return {"video": torch.randn(3, 4, 16, 16, generator=made), "label": key.clip, "caption": "", "path": ""}


class Killer(threading.Thread):
    """Kills processes until ``count`` are killed: mostly one, now and then all, or one that has just started.

    Args:
        count: how many.
        find: lists the processes that may be killed.

    Attributes:
        left: how many are still to be killed.
        delivered: how many batches the test has had, which it sets.
        done: set by the test when it ends.
    """

    def __init__(self, count, find):
        super().__init__(daemon=True)
        self.left, self.find, self.seed, self.delivered = count, find, random.randrange(2**31), 0
        self.done = threading.Event()
        print(f"seed {self.seed}")

    def run(self):
        draw = random.Random(self.seed)
        while self.left > 0:
            seen = self.delivered
            self.wait(lambda seen=seen: self.delivered != seen)  # so that the data get on
            time.sleep(draw.choice([0, 0.002, 0.02]) * draw.random())
            found = self.find()
            if draw.random() < 0.3 and found:
                self.kill(found[:1])
                known = set(found)
                # None come after one that was ending anyway.
                self.wait(lambda known=known: set(self.find()) - known, seconds=2)
                time.sleep(draw.choice([0, 0.01]) * draw.random())
                found = list(set(self.find()) - known)
            self.kill(found if draw.random() < 0.2 else found and [draw.choice(found)])

    def wait(self, condition, seconds=float("inf")):
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            if self.done.wait(0.001):
                raise SystemExit  # the test has ended, and this thread ends with it

    def kill(self, processes):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                self.left -= 1


def workers_of_this_process():
    """The processes that this one forked, which have its command line: not those that other tests have started."""
    own = Path("/proc/self/cmdline").read_bytes()
    return [process for process, parent, command in processes() if parent == os.getpid() and command == own]


def decoders_of_workers():
    """The processes that decode for the workers."""
    workers = workers_of_this_process()
    return [process for process, parent, command in processes() if parent in workers and decodes(command)]


def decodes(command):
    return b"hpdm.data.decoding" in command


def processes():
    """``(number, number of the parent, command line)`` of the processes that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found.append((int(folder.name), int(parent), (folder / "cmdline").read_bytes()))
    return found


@pytest.fixture
def pinned(monkeypatch, request):
    """Whether batches pass through PyTorch's thread that pins memory; without a GPU it runs and pins nothing."""
    if request.param and not torch.cuda.is_available():
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
        monkeypatch.setattr(pin_memory, "pin_memory", lambda data, device: data)
    return request.param


@pytest.fixture(autouse=True)
def _deaths(monkeypatch, quick_checks):
    """Any number of deaths in a row is borne; temporary files of the dead are removed."""
    monkeypatch.setattr(loader, "_MAX_DEATHS", 1000)
    # Not a folder of pytest's, whose long name may not fit into the address of a socket.
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield


def make(data, workers, pinned, keys):
    return DataLoader(data, batch_sampler=keys, num_workers=workers, collate_fn=collate, pin_memory=pinned)


def check(data, clips, workers, pinned, killer):
    """Reads while processes are killed, and compares each batch with one that this process reads by itself."""
    order, last = ClipOrder(clips, 3, seed=1), None
    keys = (order.keys(number) for number in itertools.count())
    batches = loader.load(functools.partial(make, data, workers, pinned), keys)
    killer.start()
    try:
        for number in itertools.count():
            expected = collate([data[key] for key in order.keys(number)])
            batch = next(batches)
            for name in ("video", "labels"):
                assert torch.equal(batch[name], expected[name]), f"{name} of batch {number}"
            assert batch["paths"] == expected["paths"]
            killer.delivered = number + 1
            if not killer.is_alive():
                assert killer.left <= 0, "the thread that kills has ended early"
                last = last or number + 10
                if number == last:
                    break
    finally:
        batches.close()
        killer.done.set()
        killer.join()


# The thread ends with an error when the process ends that it takes a batch from.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("pinned", [False, True], indirect=True, ids=["plain", "pinned"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_kills_at_random_moments_change_no_batch(workers, pinned, caplog):
    with caplog.at_level(logging.WARNING, "hpdm.data.loader"):
        check(Noise(), 50, workers, pinned, Killer(KILLS, workers_of_this_process))
    assert caplog.records
    assert all("was ended by SIGKILL; lack of memory" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("find", [workers_of_this_process, decoders_of_workers], ids=["workers", "decoders"])
def test_kills_while_videos_are_read_change_no_batch(clips, find):
    check(VideoDataset(clips, frames=4, size=16), 6, 2, False, Killer(KILLS, find))


def test_kills_change_no_loss_of_a_training_run(clips, saved_run, tmp_path):
    """Of workers and of their decoders, now and then, while ``hpdm train`` runs as a whole."""
    done, draw, killed = threading.Event(), random.Random(), []

    def kill():
        while not done.wait(draw.uniform(0.8, 2.0) if killed else 0.02):
            found = draw.choice([workers_of_this_process, decoders_of_workers])()
            with contextlib.suppress(ProcessLookupError):
                for process in found[:1]:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        train(train_options(clips, tmp_path, workers=2, save_every=100))
    finally:
        done.set()
        thread.join()
    expected, got = (
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]
        for run in (saved_run, tmp_path)
    )
    assert got == expected
    assert killed
