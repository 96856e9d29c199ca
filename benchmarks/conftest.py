"""The fixtures of the benchmarks, and the tables and files at the end of a run.

How to write one (all numbers come from ``compare``; a test without it can take ``record``)::

    import pytest
    from benchmarks import peers, shapes
    from hpdm_kernels import reference, sample_context

    @pytest.mark.parametrize("shape", shapes.CONTEXT, ids=str)
    @pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
    def test_sample_context(compare, backends, device, generator, shape, direction):
        sources, source_boxes, box = shape.make(generator, device)

        def ours(backend):
            return lambda *sources: sample_context(
                sources, source_boxes, box, shape.source_grids, shape.grid, backend=backend
            )

        compare(
            {
                "reference (grid_sample)": lambda *s: reference.sample_context(s, source_boxes, box, ...),
                "separable matmul": lambda *s: peers.separable_context(s, source_boxes, box, ...),
                **{f"hpdm {backend}": ours(backend) for backend in backends},
            },
            inputs=sources,                  # the differentiable tensors; everything else is closed over
            group="sample_context",          # one table per group
            shape=str(shape),
            direction=direction,             # "fwd" or "fwd+bwd" (gradients of all floating inputs)
            reference="reference (grid_sample)",   # speed-ups are relative to this one
            peers=["separable matmul"],      # may fail to run here (the table says why); ours may not
            bytes=shape.bytes(direction),    # what an ideal implementation moves, or None
            flops=shape.flops(direction),    # what the formula costs, or None
            arithmetic={"hpdm triton tf32": "tf32"},   # who takes fp32 products otherwise than PyTorch is set to
        )

Before anything is timed, every contender's output (and gradients) must err at most twice as much as the reference's
against the reference in fp64 (``oracle=`` names another oracle, ``budgets={"name": 8.0}`` another factor). A contender
that fails or errs more gets a row that says so, the others are timed, and then the test fails. ``backends`` is
``("torch",)`` on the CPU and ``("torch", "triton")`` on CUDA. Options: ``--save-as NAME`` writes the results to
``benchmarks/results/NAME`` instead of ``benchmarks/results/local``, ``--seconds S`` is the time per comparison (0: only
validate).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import charts, harness, report

RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[list[harness.Row]]()
TESTS = pytest.StashKey[list[dict[str, Any]]]()
CEILINGS = pytest.StashKey[dict[str, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hpdm benchmarks")
    group.addoption("--save-as", default="local", metavar="NAME", help="folder of benchmarks/results for the results")
    group.addoption("--results", type=Path, metavar="FILE", help="write the results to this file alone, without tables")
    group.addoption("--seconds", type=float, default=1.0, help="timing per comparison, all contenders together")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[TESTS] = []
    config.stash[CEILINGS] = {}
    # pytest-benchmark's own table would time whole rounds of contenders; its JSON (--benchmark-json) has our rows.
    if config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_quiet = True


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def backends(device: torch.device) -> tuple[str, ...]:
    """Our backends that are worth timing: Triton's interpreter is for tests."""
    return ("torch", "triton") if device.type == "cuda" else ("torch",)


@pytest.fixture
def generator() -> torch.Generator:
    """Of the CPU, with a fixed seed: two runs time the same inputs."""
    return torch.Generator().manual_seed(0)


def add_rows(config: pytest.Config, rows: Sequence[harness.Row]) -> None:
    """Keeps rows for the tables, each with its floor; the first ones measure the ceilings."""
    ceilings = config.stash[CEILINGS]
    if rows and not ceilings:
        ceilings.update(harness.ceilings(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    config.stash[ROWS] += [harness.add_floor(row, ceilings) for row in rows]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., harness.Row]:
    """``record(group, shape, contender, direction, samples, bytes=..., flops=..., extra={...})``: adds one row."""

    def add(*arguments: Any, **fields: Any) -> harness.Row:
        row = harness.row_from_samples(*arguments, **fields)
        add_rows(request.config, [row])
        return row

    return add


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[..., list[harness.Row]]:
    """Validates and times contenders on the same inputs, in turns; see the docstring of this file."""
    benchmark = request.getfixturevalue("benchmark") if request.config.pluginmanager.hasplugin("benchmark") else None

    def run(
        contenders: Mapping[str, Callable[..., Tensor]], inputs: Sequence[Tensor], **options: Any
    ) -> list[harness.Row]:
        def drive(call: harness.Call, rounds: int) -> None:
            benchmark.pedantic(call, rounds=rounds, iterations=1)

        options.setdefault("seconds", request.config.getoption("--seconds"))
        try:
            rows = harness.compare(contenders, inputs, drive=drive if benchmark else None, **options)
        except harness.Wrong as wrong:
            add_rows(request.config, wrong.rows)
            raise
        add_rows(request.config, rows)
        if benchmark:
            benchmark.extra_info["rows"] = [dataclasses.asdict(row) for row in rows]
        return rows

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    outcome = yield
    if outcome.when == "call" or outcome.outcome != "passed":
        message = "" if call.excinfo is None else call.excinfo.exconly()
        test = {"id": item.nodeid, "outcome": outcome.outcome, "message": message[:500]}
        item.config.stash[TESTS].append(test | dict(outcome.user_properties))
    return outcome


def write_part(config: pytest.Config, done: bool) -> None:
    """Writes rows and tests so far to the file of ``--results``, in one step, if that was given."""
    file = config.getoption("--results")
    if file is None:
        return
    part = {
        "done": done,
        "rows": [dataclasses.asdict(row) for row in config.stash[ROWS]],
        "tests": config.stash[TESTS],
        "ceilings": config.stash[CEILINGS],
    }
    fresh = file.with_name(file.name + ".new")
    fresh.write_text(json.dumps(part), encoding="utf-8")
    os.replace(fresh, file)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    # After every test: a kernel that takes the process down does not take the other results with it.
    write_part(item.config, done=False)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    write_part(config, done=True)
    if not rows or config.getoption("--results"):
        return
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **harness.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), config.stash[CEILINGS]),
        "tests": config.stash[TESTS],
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    folder = RESULTS / config.getoption("--save-as")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M%S}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write = terminalreporter.write_line
    terminalreporter.section("benchmarks")
    for line in report.text(result).splitlines():
        write(line)
    write(f"results: {_shown(path)}")
    try:
        drawn = charts.draw(result, path.with_suffix(".png"))
    except ImportError as error:
        write(f"no charts: {error}")
    else:
        for chart in drawn:
            write(f"chart:   {_shown(chart)}")
    if exitstatus:
        print("some benchmarks failed: the tables above lack them", file=sys.stderr)


def _shown(path: Path) -> str:
    return str(path.relative_to(RESULTS.parents[1]))
