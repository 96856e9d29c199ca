"""Several processes: none waits for another one for ever, and the one that is missing is named."""

import os
import signal
import subprocess
import sys
import time

import pytest

from hpdm.training.checkpoint import list_checkpoints
from tests.processes import ROOT
from tests.reliability.hooks import hang_at_step
from tests.reliability.run_files import curve
from tests.reliability.soak import generator, times

ENDLESS = ("--steps", 100_000, "--save-every", 100_000)


def wait_for_rows(run, count, seconds=60):
    """Waits until a run has logged so many rows."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        log = run / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{run} has no {count} rows after {seconds} s")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_by_name(commands, training, tmp_path, victim):
    ranks = commands.start_ranks(2, *training, *ENDLESS, "--out", tmp_path / "run")
    wait_for_rows(tmp_path / "run", 2)
    ranks[victim].send(signal.SIGKILL)
    other = ranks[1 - victim]
    assert other.wait(15) == 1, other.output()
    assert f"hpdm: error: process {victim} ({ranks[victim].pid} on {os.uname().nodename}) has died" in other.output()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_stands_still_is_named_after_the_time_limit(commands, training, tmp_path, victim):
    ranks = commands.start_ranks(2, *training, *ENDLESS, "--out", tmp_path / "run", "--timeout", 3)
    wait_for_rows(tmp_path / "run", 2)
    began = time.monotonic()
    ranks[victim].send(signal.SIGSTOP)
    other = ranks[1 - victim]
    assert other.wait(25) == 1, other.output()
    assert time.monotonic() - began > 2.5
    assert f"process {victim} ({ranks[victim].pid} on {os.uname().nodename})" in other.output()
    assert "not answered for 3 s" in other.output()


def test_a_process_that_hangs_while_others_wait_is_named(commands, training, tmp_path):
    """It lives and answers, but its main thread waits for clips that never come."""
    ranks = commands.start_ranks(
        2, *training, *ENDLESS, "--out", tmp_path / "run", "--timeout", 3, before=[None, (hang_at_step, [4])]
    )
    assert [rank.wait(60) for rank in ranks] == [1, 1], ranks[0].output()
    about = f"process 1 ({ranks[1].pid} on {os.uname().nodename}) hangs at step 3, reading clips, for 3 s"
    assert all(about in rank.output() for rank in ranks), ranks[0].output()


def test_a_process_that_never_comes_is_missed(commands, training, tmp_path):
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    process = commands.start(*training, *ENDLESS, "--out", tmp_path / "run", "--timeout", 2, RANK="0", **common)
    assert process.wait(30) == 1
    assert "processes: not all 2 have come within 2 s" in process.output()
    assert not (tmp_path / "run").exists()


def test_ranks_end_with_their_launcher_and_save(training, tmp_path):
    """The real torchrun, killed: its processes do not train on, which would disturb the run that is started again."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hpdm"]
    log = (tmp_path / "log.txt").open("w")
    launcher = subprocess.Popen(
        [*command, *map(str, (*training, *ENDLESS, "--out", run))], cwd=ROOT, stdout=log, stderr=log,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for_rows(run, 2, 120)
        launcher.kill()
        launcher.wait()
        end = time.monotonic() + 20
        while (run / ".lock").exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert not (run / ".lock").exists(), (tmp_path / "log.txt").read_text()
        (checkpoint,) = list_checkpoints(run)
        assert int(checkpoint.name[5:]) == max(curve(run))
    finally:
        log.close()
        subprocess.run(["pkill", "-KILL", "-s", str(launcher.pid)], check=False)


def test_signals_to_one_process_or_all_save_and_end_within_ten_seconds(commands, training, tmp_path):
    """Once or twice, whatever is logged how often, with or without processes that read clips."""
    random = generator("signals")
    for number in range(times(3, 100)):
        run, world_size = tmp_path / f"run{number}", random.choice((1, 2))
        kind = random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
        log_every, workers = random.choice((1, 2000)), random.choice((0, 1))
        words = [*training, *ENDLESS, "--out", run, "--log-every", log_every, "--workers", workers]
        ranks = commands.start_ranks(2, *words) if world_size == 2 else [commands.start(*words)]
        wait_for_rows(run, 3) if log_every == 1 else time.sleep(random.uniform(6, 8))
        targets = random.choice(([random.choice(ranks)], ranks))
        twice, began = random.choice((None, 0.02, 0.1, 0.3, 0.6, 1.0)), time.monotonic()
        for again in (False, True):
            if again and twice is not None:
                time.sleep(twice)
            for rank in targets if twice is not None or not again else ():
                rank.send(kind)
        status = [rank.wait(20) for rank in ranks]
        what = f"{kind.name} to {len(targets)} of {world_size}, again after {twice}, log {log_every}, workers {workers}"
        assert status == [128 + kind] * world_size, f"{what}: {status} {[rank.output() for rank in ranks]}"
        assert time.monotonic() - began < 10, what
        (checkpoint,) = list_checkpoints(run)
        assert f"stopped at step {int(checkpoint.name[5:])}; the same command resumes" in ranks[0].output(), what
