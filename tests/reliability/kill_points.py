"""Kills this process at its n-th call of the file system: what a crash at the worst moment leaves behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.chmod",
    "os.truncate",
    "shutil.rmtree",
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def count_calls(folder: str, point: str, first: str = "", report: str = "") -> None:
    """From here on, counts the calls that change files, and kills the process at one of them.

    Python's own calls count, in every thread: opening for writing, renaming, removing, making and flushing, of paths in
    ``folder`` and of paths relative to another one, as when a tree is removed.

    Args:
        folder: where.
        point: number of the call, from 0, at which the process is killed, before the call.
        first: counting begins with the first call whose path has this in it; at once if empty.
        report: a file that gets a line per call.
    """
    counted = _Counter(folder, int(point), first, report)
    sys.addaudithook(counted.event)
    real = os.fsync

    def fsync(descriptor: Any) -> None:
        counted.call("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) else "")
        real(descriptor)

    os.fsync = fsync


class _Counter:
    def __init__(self, folder: str, point: int, first: str, report: str) -> None:
        self.folder, self.point, self.first, self.report = folder, point, first, report
        self.number = 0
        self.on = not first
        self.inside = False

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in _EVENTS or self.inside:
            return
        if name == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITES):
            return
        self.call(name, str(arguments[1] if name == "os.rename" else arguments[0]))

    def call(self, name: str, path: str) -> None:
        if not path.startswith(self.folder) and path.startswith("/"):
            return
        self.on = self.on or self.first in path
        if not self.on or (self.report and path == self.report):
            return
        if self.report:
            self.inside = True
            with open(self.report, "a", encoding="utf-8") as file:
                file.write(f"{name} {path}\n")
            self.inside = False
        if self.number == self.point:
            os.kill(os.getpid(), signal.SIGKILL)
        self.number += 1


def points_of(run: Callable[[str, Path], Any], folder: Path) -> list[str]:
    """The calls of a run, as a list of lines: ``run(point, report)`` runs it with :func:`count_calls`."""
    report = folder / "calls.txt"
    report.unlink(missing_ok=True)
    run("-1", report)
    return report.read_text().splitlines()
