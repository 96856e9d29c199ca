"""Runs pieces: in order, within their budgets, each in a process of its own, resumable after every one of them.

What a piece reports lies in ``FOLDER/<piece>.json``, written in one step when the piece ends; its tests' results arrive
before that in ``<piece>.running``, so a piece that is stopped or crashes keeps what it had. A piece whose file says
``complete`` is not run again. Clock and processes are passed in, so that all of this is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import json
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

ROOT = Path(__file__).parents[2]
# Less time than this is not worth starting a process for.
SHORTEST = 10.0
COMPLETE, STOPPED, CRASHED, NOT_RUN = "complete", "stopped", "crashed", "not run"


class Process(Protocol):
    """A piece at work."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def output(self) -> str: ...


class Clock:
    """Seconds that only go forward."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class PieceProcess:
    """The tests of a piece in a process group of its own, so that killing it kills its compilers too."""

    def __init__(self, piece: Piece, results: Path) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the process
        environment = dict(os.environ)
        # PyTorch's own products must not vary between two runs either.
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
        # The group is there as long as one process of it is, whatever became of the first.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def output(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


def command(piece: Piece, results: Path) -> list[str]:
    """How the tests of ``piece`` are run: by pytest, or without it by ``benchmarks.gpu.small_pytest``."""
    chosen = ["-k", piece.select] if piece.select else []
    runner = [sys.executable, "-m", "benchmarks.gpu.small_pytest"]
    return [*runner, f"benchmarks/{piece.file}", "--results", str(results), *chosen, *piece.options]


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON in one step: the file is either the old one or whole."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(fresh, path)


def read(path: Path) -> dict[str, Any] | None:
    """JSON, or ``None`` where there is no whole file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


@dataclass
class _Running:
    piece: Piece
    process: Process
    begin: float
    until: float


@dataclass
class Suite:
    """Pieces, where their results go, and how much time and how many processes there are."""

    pieces: Sequence[Piece]
    folder: Path
    limit: float = 540.0
    """Seconds for everything."""
    jobs: int = 8
    """Pieces side by side."""
    start: Callable[[Piece, Path], Process] = PieceProcess
    clock: Clock = field(default_factory=Clock)
    say: Callable[[str], None] = lambda line: print(line, flush=True)
    again: bool = False
    """Run complete pieces again."""

    def file(self, piece: Piece) -> Path:
        return self.folder / f"{piece.slug}.json"

    def part(self, piece: Piece) -> dict[str, Any] | None:
        """What ``piece`` reported when it last ended."""
        return read(self.file(piece))

    def complete(self, piece: Piece) -> bool:
        part = self.part(piece)
        return part is not None and part["state"] == COMPLETE

    def run(self) -> None:
        """Runs what is not complete. Stopped from outside, it ends its processes and leaves the finished parts."""
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
                    partial = self.file(piece).with_suffix(".running")
                    partial.unlink(missing_ok=True)
                    running.append(_Running(piece, self.start(piece, partial), now, now + seconds))
                for one in list(running):
                    status = one.process.poll()
                    late = status is None and self.clock.now() >= one.until
                    if late:
                        one.process.kill()
                    if late or status is not None:
                        running.remove(one)
                        self._finish(one, status)
                if running:
                    self.clock.sleep(0.1)
        finally:
            for one in running:
                one.process.kill()

    def _has_room(self, piece: Piece, running: Sequence[_Running]) -> bool:
        if piece.alone:
            return not running
        return len(running) < self.jobs and not any(one.piece.alone for one in running)

    def _finish(self, one: _Running, status: int | None) -> None:
        """Writes the part and prints a line, and the end of the output where something went wrong."""
        piece, seconds = one.piece, self.clock.now() - one.begin
        partial = self.file(piece).with_suffix(".running")
        reported = read(partial) or {}
        output = one.process.output()
        if status is None:
            state, why = STOPPED, f"stopped after its {one.until - one.begin:.0f} s"
        elif reported.get("done"):
            state, why = COMPLETE, ""
        else:
            state, why = CRASHED, f"exit status {status}; {' '.join(output[-500:].split())}"
        part = {
            "piece": piece.name, "state": state, "seconds": round(seconds, 1), "message": why,
            "tests": reported.get("tests", []), "rows": reported.get("rows", []),
            "ceilings": reported.get("ceilings", {}),
        }  # fmt: skip
        write(self.file(piece), part)
        partial.unlink(missing_ok=True)
        failed = [test for test in part["tests"] if test["outcome"] not in ("passed", "skipped")]
        self.say(
            f"{piece.name}: {state} in {seconds:.0f} s, {len(part['tests'])} tests, {len(failed)} failed"
            + (f"; {why}" if why else "")
        )
        if failed or state == CRASHED:
            self.say(output[-4000:])
