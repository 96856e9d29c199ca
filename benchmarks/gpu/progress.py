"""Saves what a process has measured so far, so that another process can continue after a crash.

The JSON has ``done`` (whether all tests have run), ``running`` (the current test, or null), ``tests``, ``rows`` and
``ceilings``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpdm.files import write_json

CONTEXT_LOST = 3
"""Exit status of a process whose CUDA context is unusable: the remaining tests need a new process."""


def read(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or ``None`` if it is missing or incomplete."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


class Progress:
    """Results of tests, written to ``file`` whenever they change; with ``None`` kept in memory only."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        before = (read(file) if file else None) or {}
        self.tests: list[dict[str, Any]] = before.get("tests", [])
        self.rows: list[dict[str, Any]] = before.get("rows", [])
        self.ceilings: dict[str, float] = before.get("ceilings", {})
        self.running: str | None = None

    def names(self) -> set[str]:
        """Ids of the tests that have a result."""
        return {test["id"] for test in self.tests}

    def begin(self, name: str) -> None:
        """Records the current test: if the process dies, this test caused it."""
        self.running = name
        self.write()

    def end(self, test: Mapping[str, Any]) -> None:
        """Adds the result of a test: its ``id``, ``outcome``, ``message`` and measurements."""
        self.running = None
        self.tests.append(dict(test))
        self.write()

    def finish(self) -> None:
        """Records that all tests have run."""
        self.running = None
        self.write(done=True)

    def write(self, done: bool = False) -> None:
        """Writes the file."""
        if self.file:
            content = {"done": done, "running": self.running, "tests": self.tests, "rows": self.rows}
            write_json(self.file, content | {"ceilings": self.ceilings})
