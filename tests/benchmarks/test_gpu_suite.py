"""The GPU suite without a GPU: order, budgets, going on after crashes, merging, and the command.

Clock and processes are made up: a process is a list of what it reports and how long it takes.
"""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import ops, summary, test_cases
from benchmarks.gpu import suite as suite_module
from benchmarks.gpu.cases import FILES, cases_of
from benchmarks.gpu.pieces import CHECKS, Piece, all_pieces, timings
from benchmarks.gpu.progress import Progress, read
from benchmarks.gpu.suite import Suite

ROOT = Path(__file__).parents[2]
CEILINGS = {
    "copy_gbs": 4000.0, "matmul_fp32_tflops": 50.0, "matmul_tf32_tflops": 400.0, "matmul_bf16_tflops": 800.0
}  # fmt: skip


class FakeClock:
    def __init__(self):
        self.time = 1000.0

    def now(self):
        return self.time

    def sleep(self, seconds):
        self.time += seconds


@dataclasses.dataclass
class Script:
    """What one process of a made-up piece does."""

    seconds: float
    outcomes: tuple[str, ...] = ("passed",)
    running: str | None = None
    """The test during which the process dies."""
    rows: tuple[dict, ...] = ()
    status: int = 0
    done: bool = True
    reports: bool = True


class FakeProcess:
    def __init__(self, script, partial, clock, log, name):
        self.script, self.partial, self.clock, self.log, self.name = script, partial, clock, log, name
        self.end = clock.now() + script.seconds
        log.append(("start", name, clock.now()))
        self.before = Progress(partial)
        if script.reports:
            self.report(done=False)

    def report(self, done):
        """Adds this process's results to those of the processes before it."""
        first = len(self.before.tests)
        tests = [
            {"id": f"{self.name}::{first + n}", "outcome": outcome, "message": "boom" if outcome == "failed" else "",
             "error_of_budget": 0.25 * (n + 1), "repeats": True}
            for n, outcome in enumerate(self.script.outcomes)
        ]  # fmt: skip
        part = {
            "done": done, "running": self.script.running, "tests": self.before.tests + tests,
            "rows": self.before.rows + list(self.script.rows), "ceilings": CEILINGS,
        }  # fmt: skip
        self.partial.write_text(json.dumps(part))

    def poll(self):
        if self.clock.now() < self.end:
            return None
        if self.script.reports:
            self.report(self.script.done)
        return self.script.status

    def kill(self):
        self.log.append(("kill", self.name, self.clock.now()))

    def output(self):
        return f"output of {self.name}"


class Machine:
    """Made-up pieces on a made-up machine; ``log`` says what was started and killed, and when.

    A list of scripts is that of the processes of a piece, one after another.
    """

    def __init__(self, folder, scripts):
        self.folder, self.scripts = folder, scripts
        self.clock, self.log, self.lines = FakeClock(), [], []

    def start(self, piece, partial):
        script = self.scripts[piece.name]
        script = script.pop(0) if isinstance(script, list) else script
        return FakeProcess(script, partial, self.clock, self.log, piece.name)

    def suite(self, pieces, **options):
        options = {"limit": 540.0, "jobs": 2, **options}
        return Suite(pieces, self.folder, start=self.start, clock=self.clock, say=self.lines.append, **options)

    def times(self, what):
        return {name: time - 1000.0 for kind, name, time in self.log if kind == what}


def piece(name, seconds=100.0, alone=False):
    return Piece(name, f"test_{name}.py", seconds, "something", alone=alone)


def row(contender="hpdm triton", median=2e-3, **fields):
    made = harness.row_from_samples("op", "small", contender, "fwd", [median], **fields)
    return dataclasses.asdict(harness.add_floor(made, CEILINGS))


def test_pieces_run_in_order_side_by_side_and_timings_alone(tmp_path):
    pieces = [piece("a"), piece("b"), piece("c"), piece("d", alone=True), piece("e", alone=True)]
    machine = Machine(tmp_path, {"a": Script(30), "b": Script(10), "c": Script(15), "d": Script(5), "e": Script(5)})
    machine.suite(pieces).run()
    starts = machine.times("start")
    assert list(starts) == ["a", "b", "c", "d", "e"]
    assert starts["a"] == starts["b"] == 0.0
    assert 10 <= starts["c"] < 11
    assert 30 <= starts["d"] < 31, "a timing waits for all checks"
    assert 35 <= starts["e"] < 36, "timings never run side by side"
    assert not machine.times("kill")


def test_a_piece_is_stopped_at_its_budget_and_keeps_what_it_reported(tmp_path):
    machine = Machine(tmp_path, {"slow": Script(500, rows=(row(),)), "next": Script(5)})
    suite = machine.suite([piece("slow", 60), piece("next", alone=True)])
    suite.run()
    assert 60 <= machine.times("kill")["slow"] < 61
    part = suite.part(piece("slow"))
    assert part["state"] == "stopped"
    assert part["message"] == "stopped after its 60 s"
    assert len(part["tests"]) == len(part["rows"]) == 1
    assert suite.complete(piece("next"))


def test_the_limit_cuts_budgets_and_leaves_the_rest_out(tmp_path):
    machine = Machine(tmp_path, {name: Script(500) for name in "abc"})
    suite = machine.suite([piece(name, 100, alone=True) for name in "abc"], limit=150)
    suite.run()
    assert 149 <= machine.times("kill")["b"] < 151
    assert suite.part(piece("c")) is None
    assert "c: not run, no time left" in machine.lines


def test_complete_pieces_are_not_run_again(tmp_path):
    pieces = [piece("good"), piece("bad"), piece("slow", 20), piece("gone")]
    first = Machine(
        tmp_path,
        {
            "good": Script(5), "bad": Script(5, ("passed", "failed")), "slow": Script(90),
            "gone": Script(5, (), done=False, status=-9),
        },
    )  # fmt: skip
    first.suite(pieces).run()
    second = Machine(tmp_path, {name: Script(5) for name in ("good", "bad", "slow", "gone")})
    second.suite(pieces).run()
    assert list(second.times("start")) == ["slow", "gone"], "a test that failed is a result, a stopped piece is none"
    assert "good: complete already" in second.lines
    assert len(read(tmp_path / "slow.json")["tests"]) == 2, "it went on behind the test that it had run"
    third = Machine(tmp_path, {name: Script(5) for name in ("good", "bad", "slow", "gone")})
    third.suite(pieces, again=True).run()
    assert len(third.times("start")) == 4
    assert len(read(tmp_path / "slow.json")["tests"]) == 1, "asked for, it begins again"


def test_killed_in_between_it_ends_its_processes_and_goes_on_later(tmp_path):
    pieces = [piece("a"), piece("b", alone=True), piece("c", alone=True)]
    machine = Machine(tmp_path, {"a": Script(5), "b": Script(50), "c": Script(5)})
    sleep = machine.clock.sleep

    def killed(seconds):
        sleep(seconds)
        if machine.clock.now() > 1020:
            raise KeyboardInterrupt

    machine.clock.sleep = killed
    with pytest.raises(KeyboardInterrupt):
        machine.suite(pieces).run()
    assert list(machine.times("kill")) == ["b"]
    again = Machine(tmp_path, machine.scripts)
    suite = again.suite(pieces)
    assert [suite.complete(p) for p in pieces] == [True, False, False]
    suite.run()
    assert list(again.times("start")) == ["b", "c"]
    assert not list(tmp_path.glob("*.running")), "nothing half done is left"


def test_a_lost_cuda_context_costs_one_test(tmp_path):
    """The process ends after the test that failed; a new one has the rest, with the rows of the first."""
    scripts = [Script(20, ("passed", "failed"), rows=(row(),), done=False, status=3), Script(10, ("passed",) * 3)]
    machine = Machine(tmp_path, {"a": scripts, "b": Script(5)})
    suite = machine.suite([piece("a"), piece("b", alone=True)])
    suite.run()
    part = suite.part(piece("a"))
    assert part["state"] == "complete"
    assert [test["outcome"] for test in part["tests"]] == ["passed", "failed", "passed", "passed", "passed"]
    assert len(part["rows"]) == 1
    assert part["message"] == "went on in a new process"
    assert "a: lost its process in a::1, a new one goes on with the rest" in machine.lines
    assert 30 <= machine.times("start")["b"] < 31, "timings wait for all of it"


def test_a_process_that_dies_costs_the_test_under_way(tmp_path):
    scripts = [Script(20, running="a::1", done=False, status=-11), Script(10)]
    machine = Machine(tmp_path, {"a": scripts})
    suite = machine.suite([piece("a")])
    suite.run()
    part = suite.part(piece("a"))
    assert part["state"] == "complete"
    assert [test["outcome"] for test in part["tests"]] == ["passed", "failed", "passed"]
    assert part["tests"][1]["message"] == "the process ended with status -11; output of a"
    assert summary.verdict(summary.merge(suite, ENVIRONMENT, "today")) == 1


def test_a_process_without_any_result_is_not_started_again(tmp_path):
    scripts = [Script(5, running="a::0", outcomes=(), done=False, status=-11), Script(5, (), done=False, status=1)]
    machine = Machine(tmp_path, {"a": scripts})
    suite = machine.suite([piece("a")])
    suite.run()
    part = suite.part(piece("a"))
    assert part["state"] == "crashed"
    assert part["message"] == "exit status 1; output of a; went on in a new process"
    assert len(part["tests"]) == 1


def test_new_processes_share_the_budget_of_their_piece(tmp_path):
    crash = Script(35, ("failed",), done=False, status=3)
    machine = Machine(tmp_path, {"a": [crash] * 9})
    suite = machine.suite([piece("a", 100)])
    suite.run()
    part = suite.part(piece("a"))
    assert part["state"] == "stopped"
    assert len(part["tests"]) == 3
    assert 100 <= machine.times("kill")["a"] < 101


def test_a_part_cut_short_on_disk_counts_as_missing(tmp_path):
    (tmp_path / "a.json").write_text('{"state": "comp')
    machine = Machine(tmp_path, {"a": Script(5)})
    suite = machine.suite([piece("a")])
    assert not suite.complete(piece("a"))
    suite.run()
    assert suite.complete(piece("a"))


ENVIRONMENT = {
    "machine": {"gpu": "Some GPU", "cpu": "some CPU", "cores": 16, "threads": 8},
    "versions": {"torch": "2.11", "triton": "3.6"},
    "float32_matmul_precision": "highest", "commit": "abc", "command": "python -m benchmarks.gpu",
}  # fmt: skip


def test_a_crash_is_reported_and_missing_pieces_are_named(tmp_path):
    pieces = [piece("checks"), piece("crash"), piece("silent"), piece("timed", alone=True), piece("table", alone=True)]
    timed = (row("reference", 4e-3, reference=True, bytes=10**9), row(bytes=10**9, flops=10**11, arithmetic="tf32"))
    machine = Machine(
        tmp_path,
        {
            "checks": Script(5, ("passed", "failed", "skipped")), "crash": Script(5, (), done=False, status=-11),
            "silent": Script(5, reports=False, status=2), "timed": Script(30, rows=timed), "table": Script(5),
        },
    )  # fmt: skip
    suite = machine.suite(pieces, limit=40.0)
    suite.run()
    result = summary.merge(suite, ENVIRONMENT, "today")
    states = {p["name"]: p["state"] for p in result["pieces"]}
    assert states == {
        "checks": "complete", "crash": "crashed", "silent": "crashed", "timed": "complete", "table": "not run"
    }  # fmt: skip
    assert summary.verdict(result) == 1
    assert result["machine"]["copy_gbs"] == 4000.0
    assert len(result["rows"]) == 2
    text = summary.markdown(result)
    assert "# Some GPU" in text
    assert "- not run: table" in text
    assert re.search(r"\| crash \| crashed \|.*exit status -11; output of crash", text)
    assert "| checks | complete | 5 s | 1 | 1 | 1 | 0.75 | 3 of 3 |" in text
    assert "| checks::1 | checks | failed | boom |" in text
    # 1e9 bytes at 4 TB/s are 250 us, 1e11 FLOPs at 400 TFLOP/s the same: 12.5 % of 2 ms.
    assert re.search(r"\| op \| small \| fwd \| hpdm triton \| tf32 \| 2 ms \| 250 us \| \w+ \| 12 % \|", text)
    json.dumps(result, allow_nan=False)


def test_nothing_at_all_merges_too(tmp_path):
    result = summary.merge(Machine(tmp_path, {}).suite([piece("a"), piece("b")]), ENVIRONMENT, "today")
    assert summary.verdict(result) == 3
    assert "- not run: a, b" in summary.markdown(result)


def test_all_well_is_exit_status_0(tmp_path):
    machine = Machine(tmp_path, {"a": Script(5)})
    suite = machine.suite([piece("a")])
    suite.run()
    assert summary.verdict(summary.merge(suite, ENVIRONMENT, "today")) == 0


def test_a_real_process_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    child = "import time; time.sleep(600)"
    parent = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    monkeypatch.setattr(suite_module, "command", lambda piece, results: [sys.executable, "-c", parent])
    process = suite_module.PieceProcess(piece("a"), tmp_path / "a.running")
    until = time.monotonic() + 30
    while not process.output().strip() and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None
    process.kill()
    assert process.poll() == -9
    status = Path(f"/proc/{int(process.output())}/stat")
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.02)
    assert time.monotonic() < until, "what it started lives on"


# ---- the pieces and the command ----


def test_every_check_is_in_exactly_one_piece():
    names = [(file, case.name) for file in FILES for _, case in cases_of(file)]
    assert len(names) > 200
    assert len(set(names)) == len(names)
    for file, name in names:
        pieces = [p.name for p in CHECKS if p.file == f"gpu/{file}.py" and p.select in name]
        assert len(pieces) == 1, f"{file}, {name} is in the pieces {pieces}"


def test_pytest_has_every_case():
    assert len(test_cases.CASES) == sum(1 for file in FILES for _ in cases_of(file))


def test_order_and_names_of_the_pieces():
    pieces = all_pieces()
    assert len({p.slug for p in pieces}) == len(pieces)
    alone = [p.alone for p in pieces]
    assert alone == sorted(alone), "checks first, timings after them"
    assert {p.file for p in pieces if p.alone} == {p.name for p in (ROOT / "benchmarks").glob("test_*.py")}
    last = timings(["test_paper_table1.py", "test_zebra.py", "test_context.py"])
    assert [p.file for p in last] == ["test_context.py", "test_zebra.py", "test_paper_table1.py"]
    assert max(last, key=lambda p: p.seconds) is last[-1]
    assert all((ROOT / "benchmarks" / p.file).exists() for p in pieces)


def test_every_registered_op_has_arguments_for_opcheck():
    made = torch.Generator().manual_seed(0)
    assert len(ops.registered_ops()) >= 10
    for op, backend in ops.ops_and_backends():
        schema = getattr(torch.ops.hpdm, op).default._schema
        if not (op.startswith(("cross_attention", "packed_attention")) and op.endswith("bwd")):
            assert len(ops.arguments(op, backend, made, torch.device("cpu"))) == len(schema.arguments), op


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_every_piece_says_so(capsys):
    assert command_line.main(["--dry-run"]) == 0
    out = capsys.readouterr()
    assert out.out.count("needs CUDA") == len(all_pieces())
    assert command_line.main(["--list", "--only", "tiles"]) == 0
    assert "tiles" in capsys.readouterr().out
    assert command_line.main([]) == 1
    assert re.search("error: (no CUDA device|.*has no)", capsys.readouterr().err)
    assert command_line.main(["--only", "nonsense"]) == 1
    assert "no piece nonsense" in capsys.readouterr().err


def test_without_pytest_the_checks_are_left(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command_line, "obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(command_line, "sources_id", lambda: "0")
    monkeypatch.setattr(command_line.importlib.util, "find_spec", lambda name: None)
    assert command_line.main(["--list", "--results", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == len(CHECKS)
    assert "has no pytest, which timings need; left out: prepare attention fp32" in printed.err


def test_the_sources_name_the_run(tmp_path):
    (tmp_path / "hpdm_kernels").mkdir()
    file = tmp_path / "hpdm_kernels" / "op.py"
    file.write_text("a = 1\n")
    before = command_line.sources_id(tmp_path)
    assert command_line.sources_id(tmp_path) == before
    file.write_text("a = 2\n")
    assert command_line.sources_id(tmp_path) != before
