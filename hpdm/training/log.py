"""Logs of a training run: a file of JSON lines, TensorBoard or Weights & Biases, and the progress bar."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch.profiler import record_function
from tqdm import tqdm

from hpdm.files import read_text, write_text
from hpdm.json_file import parse_json
from hpdm.training.speed import Speed

LogKind = Literal["jsonl", "tensorboard", "wandb"]


class Log(Protocol):
    """Receives one row of numbers per logged step, of which ``step`` is one, and pictures."""

    def write(self, row: dict[str, float]) -> None: ...
    def write_image(self, name: str, path: Path, step: int) -> None: ...
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
        """Appends a row and flushes it to the file; JSON has no NaN and no infinity, which are ``null``."""
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.file.write(json.dumps(numbers) + "\n")
        self.file.flush()

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Nothing: the picture is a file already."""

    def close(self) -> None:
        """Closes the file."""
        self.file.close()


def _step_of(line: str) -> float:
    """The step of a row; infinity for a line that is no row."""
    try:
        return float(parse_json(line, dict[str, Any], "log.jsonl")["step"])
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

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Adds a picture, a PNG."""
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes."""
        self.writer.close()


class WandbLog:
    """Scalars for Weights & Biases, in a project "hpdm" (extra ``hpdm[wandb]``).

    The files are in the run's folder. A resumed run goes on with the same curves, whose horizontal axis is ``step``.
    wandb's own variables apply: without network, ``WANDB_MODE=offline`` collects what ``wandb sync`` sends later.

    Args:
        path: the run's folder.
        config: the options of the run.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("log='wandb' needs the package wandb: pip install 'hpdm[wandb]'") from error
        self.wandb = wandb
        name = path / "wandb_id.txt"
        if not name.is_file():
            write_text(name, f"{secrets.token_hex(8)}\n")
        identity = read_text(name, 256).strip()
        self.run = wandb.init(
            project="hpdm", name=path.resolve().name, id=identity, resume="allow", dir=str(path), config=dict(config)
        )
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, float]) -> None:
        """Sends one row. Its step is a number like the others: wandb's own counts rows and never goes back."""
        self.run.log(row)

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Sends a picture, a PNG."""
        self.run.log({name: self.wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        """Sends what is left."""
        self.run.finish()


class Reports:
    """Writes a run's rows to its logs and shows its progress.

    To each row it adds ``clips_per_s``; ``data_share``, the share of time in :meth:`waiting`; and the columns of
    ``speed``. All are about the time since the previous row, without that in :meth:`paused`.

    Args:
        folder: the run's folder; ``None`` for a process that writes nothing.
        kind: ``"jsonl"`` for that log alone, ``"tensorboard"`` or ``"wandb"`` for it and that one.
        start: step from which the run starts or resumes.
        steps: last step of the run.
        batch: clips per step.
        speed: how well the device is used; ``None`` for no such columns.
        config: the options of the run, for wandb.

    Raises:
        ImportError: the log needs a package that is not installed.
    """

    def __init__(
        self,
        folder: Path | None,
        kind: LogKind,
        start: int,
        steps: int,
        batch: int,
        speed: Speed | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.logs: list[Log] = []
        if folder is not None:
            self.logs.append(JsonlLog(folder / "log.jsonl", start))
            if kind == "tensorboard":
                self.logs.append(TensorBoardLog(folder / "tensorboard", start))
            elif kind == "wandb":
                self.logs.append(WandbLog(folder, config or {}))
        self.bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.05, disable=folder is None
        )
        self.batch, self.speed, self.steps = batch, speed, 0  # steps since the last row
        self.waited, self.row_time = 0.0, time.perf_counter()  # seconds

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for log in self.logs:
            log.close()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in the block as time spent waiting for data: clips, and what is drawn for them."""
        before = time.perf_counter()
        with record_function("data"):
            yield
        self.waited += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time in the block out of all rates: it is not spent on training."""
        before = time.perf_counter()
        yield
        self.row_time += time.perf_counter() - before

    def step(self) -> None:
        """Counts a step as done."""
        self.steps += 1
        self.bar.update()

    def write(self, row: dict[str, float]) -> None:
        """Writes a row about the steps since the last one; it has ``step`` and ``loss``."""
        now = time.perf_counter()
        seconds = now - self.row_time
        row = row | {"clips_per_s": self.steps * self.batch / seconds, "data_share": self.waited / seconds}
        if self.speed is not None:
            row |= self.speed.columns(self.steps / seconds)
        self.write_row(row)
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", clips_s=f"{row['clips_per_s']:.1f}", refresh=False)
        self.steps, self.waited, self.row_time = 0, 0.0, now

    def write_row(self, row: dict[str, float]) -> None:
        """Writes a row as it is; ``step`` is in it."""
        for log in self.logs:
            log.write(row)

    def write_image(self, name: str, path: Path, step: int) -> None:
        """Shows a picture, a PNG that is there, in the logs that have pictures."""
        for log in self.logs:
            log.write_image(name, path, step)
