"""Runs pieces in order, within their budgets, each in a separate process. A run can be resumed after every test.

While a piece runs, the results of its tests are written to ``FOLDER/<piece>.running`` (``benchmarks/gpu/progress.py``).
When it ends, they are written to ``FOLDER/<piece>.json``. If a process dies, or ends because its CUDA context is lost,
only the test that it was running fails: a new process continues with the rest. A piece whose file says ``complete`` is
not run again; a piece that was stopped continues. Clock and processes are arguments, so that tests need no GPU.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.pieces import Piece
from benchmarks.gpu.progress import read
from hpdm.files import write_json

ROOT = Path(__file__).parents[2]
# No process is started if less time than this remains, in seconds.
SHORTEST = 10.0
KEPT = ("tests", "rows", "ceilings")
"""The entries of a process's report that go into the file of the piece."""
COMPLETE, STOPPED, CRASHED, NOT_RUN = "complete", "stopped", "crashed", "not run"


class Process(Protocol):
    """A process that runs a piece."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def output(self) -> str: ...


class Clock:
    """A monotonic clock, in seconds."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class PieceProcess:
    """Runs the tests of a piece in a new process group, so that killing it also kills its compilers."""

    def __init__(self, piece: Piece, results: Path) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
        environment = dict(os.environ)
        # Makes PyTorch's own products deterministic, too.
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if not piece.alone:
            environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
        self._process = subprocess.Popen(
            command(piece, results), cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def poll(self) -> int | None:
        status = self._process.poll()
        if status is not None:
            self._end_group()
        return status

    def kill(self) -> None:
        self._end_group()
        self._process.wait()

    def _end_group(self) -> None:
        # The group exists as long as any of its processes does, even if the first one has ended.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


def command(piece: Piece, results: Path) -> list[str]:
    """The command that runs the tests of ``piece``: ``benchmarks.gpu.run`` for cases, pytest for tests."""
    chosen = ["-k", piece.select] if piece.select else []
    if piece.needs_pytest:
        runner = ["pytest", f"benchmarks/{piece.file}", "-p", "no:xdist", "-p", "no:cacheprovider"]
    else:
        runner = ["benchmarks.gpu.run", Path(piece.file).stem]
    # Not as two words: pytest would treat the path as a test file once it exists.
    return [sys.executable, "-m", *runner, f"--results={results}", *chosen, *piece.options]


@dataclass
class _Running:
    piece: Piece
    process: Process
    begin: float
    until: float
    results: int
    """Tests that had a result when the process started."""
    restarts: int = 0


@dataclass
class Suite:
    """Runs pieces within limits of time and processes, and stores their results."""

    pieces: Sequence[Piece]
    folder: Path
    limit: float = 540.0
    """Seconds for everything."""
    jobs: int = 8
    """Number of pieces that run in parallel."""
    start: Callable[[Piece, Path], Process] = PieceProcess
    clock: Clock = field(default_factory=Clock)
    say: Callable[[str], None] = lambda line: print(line, flush=True)
    again: bool = False
    """Run complete pieces again, and stopped pieces from their start."""

    def file(self, piece: Piece) -> Path:
        return self.folder / f"{piece.slug}.json"

    def partial(self, piece: Piece) -> Path:
        """The file with the results of a piece while it runs."""
        return self.file(piece).with_suffix(".running")

    def part(self, piece: Piece) -> dict[str, Any] | None:
        """The results of ``piece`` from when it last ended, or ``None``."""
        return read(self.file(piece))

    def complete(self, piece: Piece) -> bool:
        part = self.part(piece)
        return part is not None and part["state"] == COMPLETE

    def run(self) -> None:
        """Runs all pieces that are not complete. If interrupted, it ends its processes and keeps the finished parts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        end = self.clock.now() + self.limit
        waiting = [piece for piece in self.pieces if self.again or not self.complete(piece)]
        for piece in self.pieces:
            if piece not in waiting:
                self.say(f"{piece.name}: complete already")
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and self._has_room(waiting[0], running):
                    piece, now = waiting.pop(0), self.clock.now()
                    seconds = min(piece.seconds, end - now)
                    if seconds < SHORTEST:
                        self.say(f"{piece.name}: not run, no time left")
                        continue
                    running.append(self._begin(piece, now, now + seconds))
                for entry in list(running):
                    status = entry.process.poll()
                    late = status is None and self.clock.now() >= entry.until
                    if late:
                        entry.process.kill()
                    if late or status is not None:
                        if not late and self._restart(entry, status):
                            continue
                        running.remove(entry)
                        self._finish(entry, status)
                if running:
                    self.clock.sleep(0.1)
        finally:
            for entry in running:
                entry.process.kill()

    def _has_room(self, piece: Piece, running: Sequence[_Running]) -> bool:
        if piece.alone:
            return not running
        return len(running) < self.jobs and not any(entry.piece.alone for entry in running)

    def _begin(self, piece: Piece, now: float, until: float) -> _Running:
        """Starts a piece; if it was stopped before, with the results of the tests that have run."""
        before = None if self.again else self.part(piece)
        partial = self.partial(piece)
        partial.unlink(missing_ok=True)
        if before:
            write_json(partial, {"done": False, "running": None} | {k: before[k] for k in KEPT})
        results = len(before["tests"]) if before else 0
        return _Running(piece, self.start(piece, partial), now, until, results)

    def _restart(self, entry: _Running, status: int | None) -> bool:
        """Starts a new process for the remaining tests if a process ended too early. Returns whether it did.

        Every process must have added a result, even if only that a test killed it, so restarts come to an end.
        """
        partial, reported = self.partial(entry.piece), read(self.partial(entry.piece))
        if reported is None or reported["done"]:
            return False
        if reported["running"]:
            output = " ".join(entry.process.output()[-300:].split())
            message = f"the process ended with status {status}; {output}"
            reported["tests"].append({"id": reported["running"], "outcome": "failed", "message": message})
            write_json(partial, reported | {"running": None})
        if len(reported["tests"]) == entry.results or entry.until - self.clock.now() < SHORTEST:
            return False
        last = reported["tests"][-1]
        self.say(f"{entry.piece.name}: lost its process in {last['id']}, a new one goes on with the rest")
        entry.results, entry.restarts = len(reported["tests"]), entry.restarts + 1
        entry.process = self.start(entry.piece, partial)
        return True

    def _finish(self, entry: _Running, status: int | None) -> None:
        """Writes the part and prints a line; if something failed, also the end of the output."""
        piece, seconds = entry.piece, self.clock.now() - entry.begin
        reported = read(self.partial(piece)) or {}
        output = entry.process.output()
        if status is None:
            state, why = STOPPED, f"stopped after its {entry.until - entry.begin:.0f} s"
        elif reported.get("done"):
            state, why = COMPLETE, ""
        else:
            state, why = CRASHED, f"exit status {status}; {' '.join(output[-500:].split())}"
        if entry.restarts:
            again = "went on in a new process" + (f" {entry.restarts} times" if entry.restarts > 1 else "")
            why = f"{why}; {again}" if why else again
        results = {"tests": [], "rows": [], "ceilings": {}} | {k: reported[k] for k in KEPT if k in reported}
        part = {"piece": piece.name, "state": state, "seconds": round(seconds, 1), "message": why, **results}
        write_json(self.file(piece), part)
        self.partial(piece).unlink(missing_ok=True)
        failed = [test for test in part["tests"] if test["outcome"] not in ("passed", "skipped")]
        self.say(
            f"{piece.name}: {state} in {seconds:.0f} s, {len(part['tests'])} tests, {len(failed)} failed"
            + (f"; {why}" if why else "")
        )
        if failed or state == CRASHED:
            self.say(output[-4000:])
