"""The fixtures of the benchmarks, and the tables and files at the end of a run.

How to write a benchmark. All numbers come from ``compare``; a test that times by itself can use ``record``::

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
            inputs=sources,                  # the differentiable tensors; the functions close over all others
            group="sample_context",          # one table per group
            shape=str(shape),
            direction=direction,             # "fwd" or "fwd+bwd" (gradients of all floating inputs)
            reference="reference (grid_sample)",   # speed-ups are relative to this one
            peers=["separable matmul"],      # may be unable to run here (the table says why); ours may not
            bytes=shape.bytes(direction),    # what an ideal implementation moves, or None
            flops=shape.flops(direction),    # what the formula costs, or None
            arithmetic={"hpdm triton tf32": "tf32"},   # contenders whose fp32 products ignore PyTorch's setting
        )

Before anything is timed, the output (and gradients) of every contender are compared with the reference in fp64. Their
error may be at most twice that of the reference (``oracle=`` sets another oracle, ``budgets={"name": 8.0}`` another
factor). A contender that fails or exceeds its budget gets a row that says so. The other contenders are timed, and then
the test fails. ``backends`` is ``("torch",)`` on the CPU and ``("torch", "triton")`` on CUDA.

Options: ``--save-as NAME`` writes the results to ``benchmarks/results/NAME`` instead of ``benchmarks/results/local``;
``--seconds S`` is the time per comparison (0: only validate).
"""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import charts, harness, machine, report
from benchmarks.gpu.progress import Progress
from hpdm.files import write_json

RESULTS = Path(__file__).parent / "results"
ROWS = pytest.StashKey[list[harness.Row]]()
PROGRESS = pytest.StashKey[Progress]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hpdm benchmarks")
    group.addoption("--save-as", default="local", metavar="NAME", help="folder of benchmarks/results for the results")
    group.addoption(
        "--results",
        type=Path,
        metavar="FILE",
        help="write the results to this file alone, and leave out tests that have one there",
    )
    group.addoption("--seconds", type=float, default=1.0, help="timing per comparison, all contenders together")
    group.addoption("--decord2", metavar="DIR", help="folder of a decord2 to measure, installed there alone")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PROGRESS] = Progress(config.getoption("--results"))
    config.stash[ROWS] = [harness.Row(**row) for row in config.stash[PROGRESS].rows]
    # pytest-benchmark's own table would show times of whole rounds; its JSON (--benchmark-json) has our rows.
    if config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_quiet = True


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return _device()


@pytest.fixture(scope="session")
def backends(device: torch.device) -> tuple[str, ...]:
    """Our backends that are worth timing: not Triton's interpreter, which is for tests."""
    return ("torch", "triton") if device.type == "cuda" else ("torch",)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with a fixed seed, so that all runs time the same inputs."""
    return torch.Generator().manual_seed(0)


def add_rows(config: pytest.Config, rows: Sequence[harness.Row]) -> None:
    """Keeps rows for the tables and adds their floors. The ceilings are measured when the first timed rows arrive."""
    ceilings = config.stash[PROGRESS].ceilings
    if not ceilings and any(row.median_s for row in rows):
        ceilings.update(machine.ceilings(_device()))
    config.stash[ROWS] += [harness.add_floor(row, ceilings) for row in rows]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., harness.Row]:
    """``record(group, shape, contender, direction, samples, bytes=..., flops=..., extra={...})`` adds one row."""

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that have a result in the file of ``--results``: an earlier process ran them."""
    names = config.stash[PROGRESS].names()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in names])
    items[:] = [item for item in items if item.nodeid not in names]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.config.stash[PROGRESS].begin(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Writes the outcome of a test and all results so far; ends the run if the CUDA context was lost."""
    outcome = yield
    progress = item.config.stash[PROGRESS]
    if outcome.when == "call" or outcome.outcome != "passed":
        message = "" if call.excinfo is None else call.excinfo.exconly()
        test = {"id": item.nodeid, "outcome": outcome.outcome, "message": message[:500]}
        progress.rows = [dataclasses.asdict(row) for row in item.config.stash[ROWS]]
        if item.nodeid not in progress.names():
            progress.end(test | dict(outcome.user_properties))
        elif progress.tests[-1]["outcome"] == "passed":  # the test passed, but its teardown failed
            progress.tests[-1] |= test
            progress.write()
    if outcome.outcome == "failed" and harness.context_lost(_device()):
        item.session.shouldstop = "the CUDA context is lost: nothing else can run in this process"
    return outcome


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    rows, progress = config.stash[ROWS], config.stash[PROGRESS]
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        progress.finish()
    if not rows or config.getoption("--results"):
        return
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine.environment(_device(), progress.ceilings or None),
        "tests": progress.tests,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    folder = RESULTS / config.getoption("--save-as")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M%S}.json"
    write_json(path, result)
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
