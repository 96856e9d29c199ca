"""Saves a run while it trains: checkpoints that it can resume from, and snapshots of the averaged weights that stay.

What a rank writes is copied to host memory, which is all that training waits for, and a thread of the rank writes the
copy: of weights that every rank has all on rank 0, of sharded weights on each rank its shards. The threads agree on a
complete checkpoint by collectives in a group of their own, beside those of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpdm import distributed
from hpdm.training.background import Background, HostCopy
from hpdm.training.checkpoint import Contents, contents_of, write_checkpoint
from hpdm.training.ema import EMA
from hpdm.training.parallel import full_tensor
from hpdm.training.second_player import SecondPlayer
from hpdm.training.tensor_folder import Piece, first_not_finite, is_sharded, pieces

WriteSnapshot = Callable[[Path, Mapping[str, Tensor], int], None]
"""Writes averaged weights by name, whole and on the CPU, of a step into a file."""


class Saver:
    """Saves one run, at most one step at a time. A context manager, which waits for what is being written.

    Every method is a collective.

    Args:
        run: the run's folder.
        model, ema, optimizer, second: what is saved.
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
        second: SecondPlayer | None = None,
    ) -> None:
        self.run, self.model, self.ema, self.optimizer, self.second = run, model, ema, optimizer, second
        self.keep, self.write_snapshot = keep, write_snapshot
        self.sharded = is_sharded(model.parameters())
        self._group = distributed.further_group() if self.sharded and distributed.world_size() > 1 else None
        ranks: Callable[[], AbstractContextManager[None]] = distributed.single_process
        if self._group is not None:
            ranks = partial(distributed.communicating_over, self._group)
        self._background, self._copy = Background(ranks), HostCopy()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.wait()
        self._background.__exit__(kind, *rest)
        # After an error other ranks may be gone, and would be waited for.
        if kind is None and self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def save(self, step: int, *, checkpoint: bool, snapshot: bool) -> None:
        """Saves what is asked for of this step, once what was saved before is written.

        Raises:
            FloatingPointError: it holds numbers that are not finite; nothing is written.
            OSError: this cannot be written, or what was saved before could not be. Complete files are untouched.
        """
        self.wait()
        contents = contents_of(self.model, self.ema, self.optimizer, self.second) if checkpoint else None
        self._check_finite({"ema": pieces(self.ema.folders["ema"])} if contents is None else contents.parts)
        averaged = self._gathered_average() if snapshot and self.sharded else {}
        if self.sharded or distributed.is_first():
            self._start(step, contents, averaged, snapshot and distributed.is_first())

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

    def _check_finite(self, parts: Mapping[str, Mapping[str, Piece]]) -> None:
        """Raises FloatingPointError on all ranks where a number that would be written is not finite."""
        with distributed.raise_on_all_ranks():
            for part, own in parts.items():
                name = first_not_finite({name: piece.tensor for name, piece in own.items()})
                if name is not None:
                    raise FloatingPointError(f"{part}/{name} holds numbers that are not finite")

    def _start(self, step: int, contents: Contents | None, averaged: Mapping[str, Tensor], snapshot: bool) -> None:
        """Copies what this rank writes and starts the thread that writes it.

        Args:
            step: of the run.
            contents: of the checkpoint, if there is one.
            averaged: the averaged weights, where they had to be gathered for a snapshot.
            snapshot: whether this rank writes one.
        """
        parts = {} if contents is None else contents.parts
        flat = {f"{part}/{name}": piece.tensor for part, own in parts.items() for name, piece in own.items()}
        if snapshot and not averaged:
            flat |= {f"ema/{name}": t for name, t in self.ema.folders["ema"].items()}
        copied = self._copy.copy(flat)
        copies = {
            part: {name: piece._replace(tensor=copied[f"{part}/{name}"]) for name, piece in own.items()}
            for part, own in parts.items()
        }
        whole = averaged or {name: copied[f"ema/{name}"] for name in self.ema.folders["ema"] if snapshot}

        def write() -> None:
            self._copy.wait()
            if contents is not None:
                write_checkpoint(self.run, step, Contents(copies, contents.state), self.keep)
            if snapshot:
                self._write_snapshot(whole, step)

        self._background.start(write)

    def _gathered_average(self) -> dict[str, Tensor]:
        """The averaged weights, gathered one tensor after another; empty but on rank 0. A collective."""
        whole = {}
        for name, shard in self.ema.folders["ema"].items():
            t = full_tensor(shard)
            if distributed.is_first():
                whole[name] = t.cpu()
        return whole

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
