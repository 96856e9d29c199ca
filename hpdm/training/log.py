"""Where the numbers of a training run go: a file of JSON lines, and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol


class Log(Protocol):
    """Takes one row of numbers per logged step."""

    def write(self, row: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonlLog:
    """One JSON object per line in ``log.jsonl``; rows of steps after ``start`` are dropped on resume."""

    def __init__(self, path: Path, start: int) -> None:
        kept = ""
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= start)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, float]) -> None:
        """Appends a row and flushes it."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half-written last line of a killed process


class TensorBoardLog:
    """Scalars for TensorBoard in the run's folder (extra ``hpdm[tensorboard]``)."""

    def __init__(self, path: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "log='tensorboard' needs the package tensorboard: pip install 'hpdm[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(path, purge_step=start + 1)

    def write(self, row: dict[str, float]) -> None:
        """One scalar per entry."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flushes and closes."""
        self.writer.close()
