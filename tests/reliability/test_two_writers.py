"""Two commands in one folder: the second one is refused at once, by name, and the first one loses nothing."""

import hashlib
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

import hpdm.lock as lock_module
from hpdm import runs
from hpdm.lock import FolderLock, LockedError
from hpdm.training.checkpoint import list_checkpoints
from tests.reliability.commands import SMALL
from tests.reliability.hooks import without_locks
from tests.reliability.run_files import check_checkpoints, curve, leftovers
from tests.reliability.soak import generator, times


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "heartbeat"])
def test_of_two_trainings_the_second_is_refused(commands, training, trained, tmp_path, locks):
    random, run = generator("trainings"), tmp_path / "run"
    before = None if locks else (without_locks, ())
    for _ in range(times(3, 100)):
        shutil.rmtree(run, ignore_errors=True)
        words = [*training, "--out", run, "--steps", 8]
        pair = [commands.start(*words, before=before)]
        time.sleep(random.choice((0, 0, 0.05, 0.3, 0.6)))
        pair.append(commands.start(*words, before=before))
        status = [process.wait(60) for process in pair]
        assert sorted(status) == [0, 1] or status == [0, 0], [process.output() for process in pair]
        refused = [process for process in pair if process.status() == 1]
        for process in refused:  # none if the first one had ended before the second one came
            other = pair[1 - pair.index(process)]
            about = f"out: {run} is in use by `hpdm train`, process {other.pid} on {socket.gethostname()}, since "
            assert about in process.output() or f"{run} is in use by another process" in process.output()
            assert "Traceback" not in process.output()
        check_checkpoints(run, trained, at_least=8)
        assert curve(run) == curve(trained)
        assert leftovers(run) == []


def test_a_refusal_takes_less_than_a_second(tmp_path):
    with FolderLock(tmp_path / "run", "out", "hpdm train"):
        child = os.fork()
        if child == 0:
            lock_module._held.clear()  # as in a process that was started on its own
            began = time.monotonic()
            try:
                FolderLock(tmp_path / "run", "out", "hpdm train").__enter__()
            except LockedError:
                os._exit(0 if time.monotonic() - began < 1 else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(LockedError, match="run is in use by another thread of this process"):
            FolderLock(tmp_path / "run", "out", "hpdm train").__enter__()
    assert not (tmp_path / "run").exists(), "a folder in which nothing was written is removed"
    with FolderLock(tmp_path / "run", "out", "hpdm train"):
        (tmp_path / "run" / "file").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["file"]


def test_the_lock_of_a_killed_process_is_free(commands, training, tmp_path):
    for before in (None, (without_locks, ())):
        run = tmp_path / ("locks" if before is None else "heartbeat")
        process = commands.start(*training, "--out", run, "--steps", 10_000, before=before)
        end = time.monotonic() + 60
        while not (run / "log.jsonl").exists() and time.monotonic() < end:
            time.sleep(0.02)
        process.send(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
        assert any(path.name.startswith(".lock") for path in run.iterdir())
        again = commands.run(*training, "--out", run, "--steps", 4, before=before)
        assert again.status() == 0, again.output()
        assert leftovers(run) == []


def test_a_lock_of_another_machine_is_stale_once_it_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "lockf", lock_module.lockf)  # put back at the end
    without_locks()
    with FolderLock(tmp_path, "out", "hpdm train"):
        owner = tmp_path / ".lock.owner"
        text = owner.read_text()
        monkeypatch.setattr(lock_module, "_held", set())
        elsewhere = text.replace(f'"{socket.gethostname()}"', '"elsewhere"')
        assert elsewhere != text
        owner.write_text(elsewhere)
        with pytest.raises(LockedError, match=r"process \d+ on elsewhere"):
            FolderLock(tmp_path, "out", "hpdm train").__enter__()
        old = time.time() - 2 * lock_module.STALE
        os.utime(owner, (old, old))
        with FolderLock(tmp_path, "out", "hpdm train"):
            assert '"elsewhere"' not in owner.read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.lock"):
        FolderLock(tmp_path / "run", "out", "hpdm train").__enter__()
    assert (tmp_path / "victim").read_text() == "untouched"


def videos(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.mp4")}


def test_samplers_share_a_folder_unless_they_sample_the_same(commands, trained, tmp_path):
    words = ["sample", "--run", trained, "--count", 2, "--steps", 2, *SMALL]
    for seed in (0, 10):
        assert commands.run(*words, "--seed", seed, "--out", tmp_path / "whole").status() == 0
    for _ in range(times(1, 50)):
        out = tmp_path / "both"
        shutil.rmtree(out, ignore_errors=True)
        pair = [commands.start(*words, "--seed", seed, "--out", out) for seed in (0, 10)]
        assert [process.wait(60) for process in pair] == [0, 0], [process.output() for process in pair]
        assert videos(out) == videos(tmp_path / "whole")
        assert leftovers(out) == []
        shutil.rmtree(out)
        pair = [commands.start(*words, "--out", out) for _ in range(2)]
        status = sorted(process.wait(60) for process in pair)
        assert status in ([0, 1], [0, 0])
        for process in pair:
            if process.status() == 1:
                assert f"out: the same sampling into {out} is in use by" in process.output()
        assert videos(out).items() <= videos(tmp_path / "whole").items()
        assert len(videos(out)) == 2


def test_a_run_can_be_sampled_while_it_trains(commands, training, tmp_path):
    """Also into its own folder, and while its checkpoints are deleted."""
    run = tmp_path / "run"
    process = commands.start(*training, "--out", run, "--steps", 100_000, "--save-every", 1, "--keep", 1)
    end = time.monotonic() + 60
    while not list_checkpoints(run) and time.monotonic() < end:
        time.sleep(0.02)
    for seed in range(times(2, 50)):
        words = ["sample", "--run", run, "--out", run / "videos", "--count", 1, "--steps", 1, *SMALL]
        sampled = commands.run(*words, "--seed", seed)
        assert sampled.status() == 0, sampled.output()
    for _ in range(times(20, 500)):
        runs.load(run)
    process.send(signal.SIGTERM)
    assert process.wait(30) == 143, process.output()
    assert len(list((run / "videos").glob("*.mp4"))) == times(2, 50)
