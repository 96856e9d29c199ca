"""The runner of cases, and pytest with the benchmarks' fixtures: results as they come, and on after a lost context."""

from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import run as runner
from benchmarks.gpu.cases import Case, Skipped, against_formula
from benchmarks.gpu.pieces import all_pieces
from benchmarks.gpu.progress import read
from benchmarks.gpu.suite import command

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results.json"


@pytest.fixture
def run_cases(monkeypatch, results):
    """Runs made-up cases, ``name -> check``, as those of one file, and returns the exit status."""

    def run_them(checks, *arguments):
        monkeypatch.setattr(
            runner, "cases_of", lambda file: [(f"{file}::{name}", Case(name, check)) for name, check in checks.items()]
        )
        return runner.main(["tiles", "--results", str(results), *arguments])

    return run_them


def times(factor):
    """A check of an op that multiplies by ``factor`` where 2 is right."""
    return lambda device, generator: against_formula(lambda a: a * factor, lambda a: a * 2, [torch.randn(5)])


def test_the_runner_of_cases(run_cases, results):
    under_way = []

    def skipped(device, generator):
        under_way.append(read(results)["running"])
        raise Skipped("needs a device with 24 GB")

    checks = {"right": times(2.0), "wrong": times(2.5), "skipped": skipped, "other": times(2.0)}
    assert run_cases(checks, "-k", "r") == 1
    report = read(results)
    assert report["done"]
    assert {test["id"]: test["outcome"] for test in report["tests"]} == {
        "tiles::right": "passed", "tiles::wrong": "failed", "tiles::other": "passed"
    }  # fmt: skip
    right, wrong, _ = report["tests"]
    assert right["error_of_budget"] <= 1 < wrong["error_of_budget"]
    assert right["repeats"]
    assert wrong["repeats"]
    assert wrong["message"].startswith("AssertionError: output: error")
    assert run_cases(checks) == 1
    assert read(results)["tests"][3] == {
        "id": "tiles::skipped", "outcome": "skipped", "message": "needs a device with 24 GB"
    }  # fmt: skip
    assert under_way == ["tiles::skipped"]
    assert len(read(results)["tests"]) == 4, "what has a result is not run again"


def test_a_case_that_loses_the_context_ends_the_process(run_cases, results, monkeypatch):
    lost = []

    def crash(device, generator):
        lost.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(harness, "context_lost", lambda device: bool(lost))
    checks = {"first": times(2.0), "crash": crash, "last": times(2.0)}
    assert run_cases(checks) == 3
    report = read(results)
    assert not report["done"]
    assert report["running"] is None
    assert [test["outcome"] for test in report["tests"]] == ["passed", "failed"]
    assert "illegal memory access" in report["tests"][1]["message"]
    lost.clear()
    assert run_cases(checks) == 1
    assert read(results)["done"]
    assert [test["outcome"] for test in read(results)["tests"]] == ["passed", "failed", "passed"]


TESTS = """
import pytest
from benchmarks import harness

@pytest.fixture
def bad_teardown():
    yield
    raise OSError("teardown")

def test_first(record):
    record("group", "shape", "first", "fwd", [])

@pytest.mark.skip(reason="not here")
def test_skipped():
    pass

def test_crash(record, monkeypatch):
    record("group", "shape", "crash", "fwd", [])
    harness.lost = True
    raise RuntimeError("an illegal memory access was encountered")

def test_teardown(bad_teardown):
    pass

def test_last(record):
    record("group", "shape", "last", "fwd", [])
"""


def test_pytest_goes_on_after_a_lost_context(pytester, results, monkeypatch):
    monkeypatch.setattr(harness, "context_lost", lambda device: harness.lost)
    monkeypatch.setattr(harness, "lost", False, raising=False)
    pytester.makeconftest((ROOT / "benchmarks" / "conftest.py").read_text())
    pytester.makepyfile(TESTS)
    command = [f"--results={results}", "-p", "no:xdist", "-p", "no:cacheprovider"]
    pytester.runpytest_inprocess(*command)
    report = read(results)
    assert not report["done"]
    outcomes = {"test_first": "passed", "test_skipped": "skipped", "test_crash": "failed"}
    assert {test["id"].split("::")[1]: test["outcome"] for test in report["tests"]} == outcomes
    assert [row["contender"] for row in report["rows"]] == ["first", "crash"]
    harness.lost = False
    pytester.runpytest_inprocess(*command)
    report = read(results)
    assert report["done"]
    outcomes |= {"test_teardown": "failed", "test_last": "passed"}
    assert {test["id"].split("::")[1]: test["outcome"] for test in report["tests"]} == outcomes
    assert len(report["tests"]) == len(outcomes)
    assert [row["contender"] for row in report["rows"]] == ["first", "crash", "last"]


def test_a_collection_error_is_not_done(pytester, results):
    pytester.makeconftest((ROOT / "benchmarks" / "conftest.py").read_text())
    pytester.makepyfile("raise ImportError('no')")
    pytester.runpytest_inprocess(f"--results={results}", "-p", "no:xdist", "-p", "no:cacheprovider")
    assert not (read(results) or {}).get("done")


def test_how_pieces_are_run(tmp_path):
    by_file = {p.file: command(p, tmp_path / "r")[1:] for p in all_pieces()}
    assert by_file["gpu/tiles.py"][:3] == ["-m", "benchmarks.gpu.run", "tiles"]
    assert by_file["test_tiles.py"][:3] == ["-m", "pytest", "benchmarks/test_tiles.py"]
    assert all(f"--results={tmp_path / 'r'}" in words for words in by_file.values())
