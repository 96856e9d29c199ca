"""Processes that read: killed, hung or dead on a clip, data go on, the same bit for bit, and the clip is named."""

import functools
import logging
import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader

from hpdm.data import decode
from hpdm.data.clips import VideoDataset
from hpdm.data.loader import load
from hpdm.data.order import ClipOrder
from hpdm.training.batches import MicroBatches
from hpdm.video import write_video


@pytest.fixture
def flat(tmp_path, generator):
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(4):
        write_video(root / f"{i}.mp4", torch.randint(0, 256, (3, 8, 16, 16), generator=generator, dtype=torch.uint8))
    return root


def answering(code):
    """Code for ``patch_worker``: ``code`` defines ``answer``, which takes the place of ``real``."""
    return f"real = server.Server.answer\n{code}\nserver.Server.answer = answer"


@pytest.fixture
def spoken():
    """What this process and its children log goes to stderr, as it does outside of pytest."""
    log, handler = logging.getLogger("hpdm"), logging.Handler()
    handler.emit = lambda record: os.write(2, f"{record.getMessage()}\n".encode())
    log.addHandler(handler)
    yield
    log.removeHandler(handler)


def read(data, workers, steps=4):
    loader = DataLoader(data, batch_sampler=MicroBatches(4, 3, 3, seed=1), num_workers=workers)
    return [batch for batch, _ in zip(loader, range(steps))]


def same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert torch.equal(batch["video"], other["video"])
        assert batch["path"] == other["path"]


@pytest.mark.parametrize("op", ["probe", "read"])
def test_a_decoding_process_that_is_killed_costs_nothing(flat, tmp_path, patch_worker, caplog, op):
    expected = read(VideoDataset(flat, frames=4, size=16), 0)
    patch_worker(
        answering(
            f"once = {str(tmp_path / 'once')!r}\n"
            f"def answer(self, request):\n"
            f"    if request['op'] == {op!r} and request['path'].endswith('2.mp4') and not os.path.exists(once):\n"
            f"        open(once, 'w').close()\n"
            f"        os.kill(os.getpid(), signal.SIGKILL)\n"
            f"    return real(self, request)"
        )
    )
    with caplog.at_level(logging.WARNING, "hpdm.data"):
        same(read(VideoDataset(flat, frames=4, size=16), 0), expected)
    assert (tmp_path / "once").exists()
    assert [r.getMessage() for r in caplog.records] == [
        f"{flat / '2.mp4'}: the decoding process died (exit status -9); asked once more"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_on_which_decoding_dies_is_named_and_replaced(flat, patch_worker, spoken, capfd, workers):
    reason = "not a readable video: the decoding process died (exit status -9)"
    expected = VideoDataset(flat, frames=4, size=16)
    patch_worker(
        answering(
            "def answer(self, request):\n"
            "    if request['path'].endswith('2.mp4'):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(self, request)"
        )
    )
    batches = read(VideoDataset(flat, frames=4, size=16), workers)
    said = capfd.readouterr().err
    assert f"clip skipped: {flat / '2.mp4'}: {reason}" in said
    assert not any(name in said for name in ("0.mp4", "1.mp4", "3.mp4"))
    paths = [[key.clip for key in ClipOrder(4, 3, seed=1).keys(step)] for step in range(4)]
    assert [batch["path"] for batch in batches] == [
        [str(flat / f"{3 if clip == 2 else clip}.mp4") for clip in clips] for clips in paths
    ]
    assert expected[0]["video"].shape == batches[0]["video"].shape[1:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_does_not_answer_ends_the_read_and_is_never_replaced(flat, patch_worker, workers):
    """How long a disk takes must not decide which clips a run sees."""
    patch_worker(
        answering(
            "def answer(self, request):\n"
            "    if request['path'].endswith('2.mp4'):\n        time.sleep(600)\n"
            "    return real(self, request)"
        )
    )
    data = VideoDataset(flat, frames=4, size=16, timeout=0.5)
    batches = load(functools.partial(make, data, workers), MicroBatches(4, 3, 3, seed=1))
    with pytest.raises(decode.StalledError, match=r"2\.mp4: no answer within 2 s, decoder stopped, after 3 tries"):
        list(zip(batches, range(4)))


def test_a_pipe_in_place_of_a_clip_does_not_hang(flat, spoken, capfd):
    data = VideoDataset(flat, frames=4, size=16)
    (flat / "2.mp4").unlink()
    os.mkfifo(flat / "2.mp4")
    assert len(read(data, 2)) == 4
    assert f"clip skipped: path: {flat / '2.mp4'} is not a file" in capfd.readouterr().err
    assert len(VideoDataset(flat, frames=4, size=16)) == 3, "it is not listed as a clip either"


def make(data, workers, keys):
    return DataLoader(data, batch_sampler=keys, num_workers=workers)


def test_loading_is_the_same_for_any_number_of_workers(flat):
    data, keys = VideoDataset(flat, frames=4, size=16), [ClipOrder(4, 3).keys(step) for step in range(5)]
    expected = list(load(functools.partial(make, data, 0), keys))
    assert len(expected) == 5
    for workers in (1, 2):
        same(list(load(functools.partial(make, data, workers), keys)), expected)
    resumed = load(functools.partial(make, data, 2), MicroBatches(4, 3, 3, seed=0, start=2))
    same([next(resumed) for _ in range(3)], expected[2:])
    resumed.close()


def test_workers_that_are_killed_are_started_again(flat, caplog):
    data = VideoDataset(flat, frames=4, size=16)
    sampler = MicroBatches(4, 3, 3, seed=2)
    before = set(multiprocessing.active_children())
    batches = load(functools.partial(make, data, 2), sampler)
    got = [next(batches)]
    for worker in set(multiprocessing.active_children()) - before:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with caplog.at_level(logging.WARNING, "hpdm.data.loader"):
        got += [next(batches) for _ in range(7)]
    batches.close()
    same(got, [batch for batch, _ in zip(make(data, 0, sampler), range(8))])
    assert len(caplog.records) == 1
    assert "started again: DataLoader worker (pid" in caplog.text
    assert not set(multiprocessing.active_children()) - before


class Failing:
    """A loader that gives its keys as batches and raises at the third."""

    num_workers = 0

    def __init__(self, error, keys):
        self.error, self.keys = error, keys

    def __iter__(self):
        for key in self.keys:
            if key == 2:
                raise self.error
            yield key


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        ConnectionRefusedError("Caught ConnectionRefusedError in pin memory thread for device 0.\nOriginal Traceback"),
        EOFError("Caught EOFError in pin memory thread for device 0.\nOriginal Traceback"),
    ],
    ids=["found", "signalled", "refused", "ended"],
)
def test_workers_that_keep_dying_end_the_run(error, caplog):
    batches = load(functools.partial(Failing, error), [0, 1, 2, 3])
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(RuntimeError, match=r"died 3 times over one batch: .*; lack of memory is") as caught:
        next(batches)
    assert str(error).splitlines()[0].rstrip(".") in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("[Errno 2] No such file or directory: 'DataLoader worker'"),
        RuntimeError("Caught RuntimeError in pin memory thread for device 0.\nCUDA error: out of memory"),
    ],
    ids=["file", "pinning"],
)
def test_other_errors_are_not_taken_for_deaths(error, caplog):
    batches = load(functools.partial(Failing, error), [0, 1, 2, 3])
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert caught.value is error
    assert not caplog.records


def test_the_error_of_a_worker_is_what_it_met_and_not_its_traceback():
    text = "Caught DecodeError in DataLoader worker process 0.\nOriginal Traceback\nhpdm.data.DecodeError: a: cut\n"
    batches = load(functools.partial(Failing, decode.DecodeError(text)), [0, 1, 2, 3])
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(decode.DecodeError, match=r"^a: cut$"):
        next(batches)
