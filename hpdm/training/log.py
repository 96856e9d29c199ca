"""Logs of a training run: a file of JSON lines, TensorBoard, and the progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from tqdm import tqdm

from hpdm.files import write_text


class Log(Protocol):
    """Receives one row of numbers per logged step; ``step`` is one of them."""

    def write(self, row: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonlLog:
    """A file with one JSON object per line; rows of steps after ``start``, which a resumed run repeats, are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        kept = ""
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = "".join(f"{line}\n" for line in lines if _step_of(line) <= start)
        write_text(path, kept)
        self.file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, float]) -> None:
        """Appends a row and flushes it to the file."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _step_of(line: str) -> float:
    """The step of a row; infinity for a line that is no row."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the incomplete last line of a killed process


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
        """Adds one scalar per entry."""
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Flushes and closes."""
        self.writer.close()


class Reports:
    """Writes a run's rows to its logs and shows its progress.

    To each row it adds ``clips_per_s`` and ``data_share``, the share of time spent waiting for data, both since the
    previous row.

    Args:
        folder: the run's folder; ``None`` for a process that writes nothing.
        kind: ``"jsonl"`` for that log alone, ``"tensorboard"`` for both.
        start: step from which the run starts or resumes.
        steps: last step of the run.
        batch: clips per step.
    """

    def __init__(
        self, folder: Path | None, kind: Literal["jsonl", "tensorboard"], start: int, steps: int, batch: int
    ) -> None:
        self.logs: list[Log] = []
        if folder is not None:
            self.logs.append(JsonlLog(folder / "log.jsonl", start))
            if kind == "tensorboard":
                self.logs.append(TensorBoardLog(folder / "tensorboard", start))
        self.bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05, disable=folder is None
        )
        self.batch, self.steps = batch, 0  # steps since the last row
        self.waited, self.row_time = 0.0, time.perf_counter()  # seconds

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for log in self.logs:
            log.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in the block as time spent waiting for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def step(self) -> None:
        """Counts a step as done."""
        self.steps += 1
        self.bar.update()

    def write(self, row: dict[str, float]) -> None:
        """Writes a row of the step just done, which has ``step`` and ``loss``."""
        now = time.perf_counter()
        row = row | {
            "clips_per_s": self.steps * self.batch / (now - self.row_time),
            "data_share": self.waited / (now - self.row_time),
        }
        for log in self.logs:
            log.write(row)
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", clips_s=f"{row['clips_per_s']:.1f}", refresh=False)
        self.steps, self.waited, self.row_time = 0, 0.0, now
