"""Saves a run while it trains: checkpoints that it can resume from, and snapshots of the averaged weights that stay.

Weights that every rank has are copied to host memory, which is all that training waits for, and rank 0 writes the copy
in a thread. Sharded weights are written by all ranks together, which then wait for it: the ranks coordinate the writing
by collectives, whose order a thread beside the training would break.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hpdm import distributed
from hpdm.training.background import Background, HostCopy
from hpdm.training.checkpoint import Contents, contents_of, write_checkpoint
from hpdm.training.ema import EMA
from hpdm.training.parallel import full_tensor
from hpdm.training.tensor_folder import first_not_finite, is_sharded

logger = logging.getLogger(__name__)

WriteSnapshot = Callable[[Path, Mapping[str, Tensor], int], None]
"""Writes averaged weights by name, whole and on the CPU, of a step into a file."""


class Saver:
    """Saves one run, at most one step at a time. A context manager, which waits for what is being written.

    Every method is a collective.

    Args:
        run: the run's folder.
        model, ema, optimizer: what is saved.
        keep: number of checkpoints that are kept; 0 for all of them.
        write_snapshot: writes a snapshot; ``None`` if the run has none.
    """

    def __init__(
        self,
        run: Path,
        model: nn.Module,
        ema: EMA,
        optimizer: torch.optim.Optimizer,
        keep: int = 2,
        write_snapshot: WriteSnapshot | None = None,
    ) -> None:
        self.run, self.model, self.ema, self.optimizer = run, model, ema, optimizer
        self.keep, self.write_snapshot = keep, write_snapshot
        self.sharded = is_sharded(model.parameters())
        self._background, self._copy = Background(), HostCopy()
        if self.sharded and distributed.is_first():
            logger.info("sharded checkpoints are written by all processes together; training waits meanwhile")

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.wait()
        self._background.__exit__(kind, *rest)

    def save(self, step: int, *, checkpoint: bool, snapshot: bool) -> None:
        """Saves what is asked for of this step, once what was saved before is written.

        Raises:
            FloatingPointError: it holds numbers that are not finite; nothing is written.
            OSError: this cannot be written, or what was saved before could not be. Complete files are untouched.
        """
        self.wait()
        contents = contents_of(self.model, self.ema, self.optimizer) if checkpoint else None
        self._check_finite({"ema": self.ema.shadow} if contents is None else contents.parts)
        if self.sharded:
            if contents is not None:
                write_checkpoint(self.run, step, contents, self.keep)
            if snapshot:
                self._write_sharded_snapshot(step)
        elif distributed.is_first():
            self._start(step, contents, snapshot)

    def check(self) -> None:
        """Raises on every rank what writing has raised so far.

        Raises:
            OSError: something could not be written.
        """
        with distributed.raise_on_all_ranks():
            self._background.check()

    def wait(self) -> None:
        """Waits until everything is written; raises as :meth:`check`."""
        with distributed.raise_on_all_ranks():
            self._background.wait()

    def snapshot_path(self, step: int) -> Path:
        """The file of a step's snapshot."""
        return self.run / "snapshots" / f"step-{step:08d}.safetensors"

    def _check_finite(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raises FloatingPointError on all ranks where a number that would be written is not finite."""
        with distributed.raise_on_all_ranks():
            for part, tensors in parts.items() if self.sharded or distributed.is_first() else ():
                name = first_not_finite(tensors)
                if name is not None:
                    raise FloatingPointError(f"{part}/{name} holds numbers that are not finite")

    def _start(self, step: int, contents: Contents | None, snapshot: bool) -> None:
        """Copies what is saved and starts the thread that writes it."""
        parts = {} if contents is None else dict(contents.parts)
        if snapshot:
            parts["ema"] = self.ema.shadow
        flat = {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
        copied = self._copy.copy(flat)
        copies = {part: {name: copied[f"{part}/{name}"] for name in tensors} for part, tensors in parts.items()}

        def write() -> None:
            self._copy.wait()
            if contents is not None:
                write_checkpoint(self.run, step, Contents(copies, contents.state), self.keep)
            if snapshot:
                self._write_snapshot(copies["ema"], step)

        self._background.start(write)

    def _write_sharded_snapshot(self, step: int) -> None:
        """Gathers the averaged weights, one tensor after another, and writes them on rank 0."""
        whole = {}
        for name, shard in self.ema.shadow.items():
            t = full_tensor(shard)
            if distributed.is_first():
                whole[name] = t.cpu()
        with distributed.raise_on_all_ranks():
            if distributed.is_first():
                self._write_snapshot(whole, step)

    def _write_snapshot(self, averaged: Mapping[str, Tensor], step: int) -> None:
        if self.write_snapshot is None:
            raise ValueError("write_snapshot: got None, expected a function, as snapshots are asked for")
        path = self.snapshot_path(step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write_snapshot(path, averaged, step)
        except OSError as error:
            raise OSError(
                f"snapshots: {path.parent} cannot take the weights of step {step} ({error}); the run's checkpoints and "
                "earlier snapshots are untouched"
            ) from error
