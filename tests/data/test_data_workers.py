"""Processes that read: killed, hung or dead on a clip, data go on, the same bit for bit, and the clip is named."""

import functools
import gc
import logging
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

from hpdm.data import decode
from hpdm.data.clips import VideoDataset
from hpdm.data.loader import load
from hpdm.data.order import ClipKey, ClipOrder
from hpdm.training.batches import MicroBatches
from hpdm.video import write_video


@pytest.fixture
def flat(tmp_path, generator):
    return write_clips(tmp_path / "flat", generator, 16)


def write_clips(root, generator, size):
    root.mkdir()
    for i in range(4):
        video = torch.randint(0, 256, (3, 8, size, size), generator=generator, dtype=torch.uint8)
        write_video(root / f"{i}.mp4", video)
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
        f"{flat / '2.mp4'}: the decoding process was killed (exit status -9); asked once more"
    ]


@pytest.mark.parametrize("where", ["launch", "probe", "read", "decord"])
def test_a_decoding_process_that_is_killed_several_times_costs_nothing(tmp_path, generator, patch_worker, where):
    """The system kills what takes memory; which clips a run sees must not depend on that."""
    root, decoder = write_clips(tmp_path / "clips", generator, 64), "decord" if where == "decord" else "pyav"
    expected = read(VideoDataset(root, frames=4, size=16, decoder=decoder), 0)
    tally = tmp_path / "tally"
    tally.touch()
    deadly = (
        f"def deadly():\n"
        f"    if os.path.getsize({str(tally)!r}) < 3:\n"
        f"        open({str(tally)!r}, 'a').write('.')\n"
        f"        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    at = {
        "launch": "deadly()",
        "decord": "busy = server.Server.busy\n"
        "server.Server.busy = lambda self, stage: (busy(self, stage), stage == 'decord' and deadly())",
    }
    at_op = answering(
        f"def answer(self, request):\n"
        f"    if request['op'] == {where!r}:\n        deadly()\n"
        f"    return real(self, request)"
    )
    patch_worker(deadly + at.get(where, at_op))
    same(read(VideoDataset(root, frames=4, size=16, decoder=decoder), 0), expected)
    assert tally.read_text() == "..."


def test_a_decoding_process_that_is_always_killed_ends_the_read(flat, patch_worker):
    """A clip that asks for more memory than there is would be seen on a larger machine."""
    patch_worker(
        answering(
            "def answer(self, request):\n"
            "    if request['path'].endswith('2.mp4'):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(self, request)"
        )
    )
    data = VideoDataset(flat, frames=4, size=16)
    with pytest.raises(decode.StalledError, match=r"2\.mp4: .* was killed \(exit status -9\), after 3 tries"):
        read(data, 0)


@pytest.mark.parametrize("failures", [2, 3])
def test_a_disk_that_fails_says_nothing_about_a_clip(flat, tmp_path, patch_worker, failures):
    """As network file systems do for a moment: read again, or the end of the read, and never another clip."""
    expected = read(VideoDataset(flat, frames=4, size=16), 0)
    tally = tmp_path / "tally"
    tally.touch()
    patch_worker(
        f"import errno\n"
        f"real = os.stat\n"
        f"def stat(path, **options):\n"
        f"    if str(path).endswith('2.mp4') and real({str(tally)!r}).st_size < {failures}:\n"
        f"        open({str(tally)!r}, 'a').write('.')\n"
        f"        raise OSError(errno.EIO, 'Input/output error')\n"
        f"    return real(path, **options)\n"
        f"os.stat = stat"
    )
    data = VideoDataset(flat, frames=4, size=16)
    if failures < 3:
        same(read(data, 0), expected)
    else:
        with pytest.raises(decode.StalledError, match=r"2\.mp4: .*Input/output error.*, after 3 tries"):
            read(data, 0)
    assert tally.read_text() == "." * failures


def test_a_decoding_process_that_does_not_start_says_so(flat, patch_worker):
    patch_worker("sys.exit(3)")
    with pytest.raises(RuntimeError, match=r"^the decoding process did not start \(exit status 3\)$"):
        read(VideoDataset(flat, frames=4, size=16), 0)


def test_a_decoding_process_that_stands_still_once_costs_nothing(flat, worker, caplog):
    data, other = (VideoDataset(flat, frames=4, size=16, timeout=0.5) for _ in range(2))
    expected = [data[number] for number in range(4)]
    other[0]
    os.kill(worker.process.pid, signal.SIGSTOP)
    with caplog.at_level(logging.WARNING, "hpdm.data"):
        got = [other[number] for number in range(4)]
    assert "no answer within 0.5 s, decoder stopped; tried again with more time" in caplog.text
    for ours, theirs in zip(got, expected):
        assert torch.equal(ours["video"], theirs["video"])
        assert (ours["path"], ours["start"]) == (theirs["path"], theirs["start"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_clip_on_which_decoding_dies_is_named_and_replaced(flat, patch_worker, spoken, capfd, workers):
    reason = "not a readable video: the decoding process died (exit status -11)"
    expected = VideoDataset(flat, frames=4, size=16)
    patch_worker(
        answering(
            "def answer(self, request):\n"
            "    if request['path'].endswith('2.mp4'):\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
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


def test_workers_that_are_killed_are_started_again(flat, caplog, quick_checks):
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
    assert "started again: process" in caplog.text
    assert not set(multiprocessing.active_children()) - before


class Doomed(VideoDataset):
    """A set whose second clip ends the process that reads it, a moment after it has sent what it read before."""

    status = -signal.SIGKILL

    def __getitem__(self, key):
        if key.clip == 1:
            time.sleep(0.5)
            os._exit(self.status) if self.status >= 0 else os.kill(os.getpid(), -self.status)
        return super().__getitem__(key)


@pytest.mark.parametrize(
    ("status", "cause"),
    [(-9, "was ended by SIGKILL"), (-64, "was ended by SIGRTMAX"), (0, "ended with exit status 0")],
)
def test_workers_that_keep_dying_end_the_run(flat, caplog, quick_checks, status, cause):
    data = Doomed(flat, frames=4, size=16)
    data.status = status
    batches = load(functools.partial(make, data, 2), [[ClipKey(clip, 0)] for clip in (0, 2, 1, 3)])
    assert [next(batches)["path"], next(batches)["path"]] == [[str(flat / f"{clip}.mp4")] for clip in (0, 2)]
    with pytest.raises(RuntimeError, match=rf"died 3 times over one batch: process \d+ {cause}; lack of memory is"):
        next(batches)
    assert len(caplog.records) == 2
    assert not multiprocessing.active_children()


class Failing(VideoDataset):
    """A set whose second clip raises an error with the words of a broken connection."""

    error = None

    def __getitem__(self, key):
        if key.clip == 1:
            raise self.error
        return super().__getitem__(key)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError("Caught ConnectionResetError in pin memory thread for device 0."),
    ],
    ids=["file", "connection"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_no_death_whatever_its_words(flat, caplog, error, workers):
    data = Failing(flat, frames=4, size=16)
    data.error = error
    batches = load(functools.partial(make, data, workers), [[ClipKey(clip, 0)] for clip in (0, 1)])
    next(batches)
    with pytest.raises(type(error)) as caught:
        next(batches)
    assert str(caught.value) == str(error)
    assert not caplog.records


class FailingBesideDeath(Failing):
    """Also, the first time, clip 2 ends the process that reads it, before clip 1 raises."""

    def __getitem__(self, key):
        tally = self.root / ".tally"
        if key.clip == 1:
            time.sleep(0.5)
        if key.clip == 2 and not tally.exists():
            tally.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


def test_an_error_beside_a_death_is_raised_once_the_dead_worker_is_replaced(flat, caplog):
    data, alive = FailingBesideDeath(flat, frames=4, size=16), []
    data.error = ValueError("a: cut")
    before = set(multiprocessing.active_children())

    def make_and_count(keys):
        alive.append(len(set(multiprocessing.active_children()) - before))
        return make(data, 2, keys)

    gc.disable()
    try:
        batches = load(make_and_count, [[ClipKey(clip, 0)] for clip in (1, 2)])
        with pytest.raises(ValueError, match=r"^a: cut$"):
            next(batches)
    finally:
        gc.enable()
    assert len(caplog.records) == 1
    assert alive == [0, 0], "the workers that are left end before their replacements start"


def test_the_error_of_a_worker_is_what_it_met_and_not_its_traceback(flat):
    data = Failing(flat, frames=4, size=16)
    data.error = decode.DecodeError("a: cut")
    batches = load(functools.partial(make, data, 1), [[ClipKey(1, 0)]])
    with pytest.raises(decode.DecodeError, match=r"^a: cut$"):
        next(batches)
