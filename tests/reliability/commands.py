"""Runs ``hpdm`` commands in processes that a test may kill, signal and watch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.processes import ROOT

SMALL = ("--overlap", "none", "--device", "cpu")
"""Options of a sampling that takes a second."""


class Commands:
    """Processes of ``hpdm``, started by a server that has imported everything. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.reliability.server"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started: list[Process] = []

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            process.kill()
        self.server.stdin.close()
        self.server.wait()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to the server."""
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self, *arguments: Any, before: tuple[Callable[..., None], Sequence[Any]] | None = None, **environment: str
    ) -> Process:
        """Starts ``hpdm ARGUMENTS``.

        Args:
            arguments: words of the command line.
            before: a function at the top of a module, and its arguments, called in the process before the command.
            environment: further variables.
        """
        self.count += 1
        log = self.folder / f"command-{self.count}.log"
        hook = None if before is None else (before[0].__module__, before[0].__name__, list(map(str, before[1])))
        request = {"start": [*map(str, arguments)], "log": str(log), "environment": environment, "before": hook}
        process = Process(self, self.ask(request)["pid"], log)
        self.started.append(process)
        return process

    def start_ranks(
        self, count: int, *arguments: Any, before: Sequence[tuple[Callable[..., None], Sequence[Any]] | None] = ()
    ) -> list[Process]:
        """Starts the command in ``count`` processes, with the variables that torchrun sets."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        hooks = [*before, *[None] * (count - len(before))]
        return [
            self.start(*arguments, before=hook, RANK=str(rank), LOCAL_RANK=str(rank), **common)
            for rank, hook in enumerate(hooks)
        ]

    def run(self, *arguments: Any, timeout: float = 120, **options: Any) -> Process:
        """Starts the command and waits for its end."""
        process = self.start(*arguments, **options)
        process.wait(timeout)
        return process


class Process:
    """A process of the server's."""

    def __init__(self, commands: Commands, pid: int, log: Path) -> None:
        self.commands, self.pid, self.log = commands, pid, log
        self._status: int | None = None

    def status(self) -> int | None:
        """The exit status, minus the number of the signal that killed it; ``None`` while it runs."""
        if self._status is None:
            self._status = self.commands.ask({"status": self.pid})["status"]
        return self._status

    def wait(self, timeout: float) -> int | None:
        """The exit status; ``None`` if it still runs after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while self.status() is None and time.monotonic() < end:
            time.sleep(0.01)
        return self.status()

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.status() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it and what it has started."""
        if self.status() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait(10)

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""
