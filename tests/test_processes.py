"""The helper that runs tests in several processes: what they print, and that a failure is seen at once."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.processes import run_ranks


def report(folder, word):
    rank = os.environ["RANK"]
    (Path(folder) / rank).write_text(word)
    print(f"rank {rank} of {os.environ['WORLD_SIZE']}, {os.environ['OMP_NUM_THREADS']} thread")


def fail_on_one():
    if os.environ["RANK"] == "1":
        sys.exit("no luck")
    time.sleep(600)


def test_a_function_runs_once_per_rank(tmp_path):
    assert run_ranks(report, 2, tmp_path, "x") == ["rank 0 of 2, 1 thread\n", "rank 1 of 2, 1 thread\n"]
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["x", "x"]


def test_a_command_gets_variables():
    code = "import os; print(os.environ['EXTRA'], os.environ['LOCAL_RANK'])"
    assert run_ranks(["-c", code], 2, EXTRA="more") == ["more 0\n", "more 1\n"]


def test_a_failure_ends_the_others():
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 of 2: status 1\nno luck"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - start < 60


def test_a_hang_ends():
    with pytest.raises(AssertionError, match="rank 0 of 1: status None"):
        run_ranks(["-c", "import time; time.sleep(600)"], 1, timeout=0.5)
