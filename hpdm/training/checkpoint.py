"""Checkpoints of a training run, written atomically: each is either complete or absent.

``RUN/checkpoints/step-00001000/`` holds ``state.json`` and the folders ``model``, ``ema`` and ``optimizer``, and with
several moving averages one more for each after the first (``ema-0.100``, by its width). A run with an opponent
(:mod:`hpdm.opponent`) also has ``opponent`` and ``opponent_optimizer``. These hold safetensors files
(:mod:`hpdm.training.tensor_folder`).

A checkpoint is written to a temporary folder, flushed to the disk and renamed, so a killed process or a full disk
leaves the previous checkpoint untouched. Its ``state.json`` lists the files that were written with their sizes and
hashes (:mod:`hpdm.training.manifest`), so damage is noticed when it is read. Only one process may write into a run, see
:mod:`hpdm.lock`.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from hpdm import distributed
from hpdm.files import write_json
from hpdm.integrity import SEAL, DamagedError, check_seal, sealed
from hpdm.json_file import Range, checked, read_json
from hpdm.training import manifest, tensor_folder
from hpdm.training.ema import EMA
from hpdm.training.manifest import Manifest
from hpdm.training.second_player import SecondPlayer
from hpdm.training.stored import weights_of
from hpdm.training.tensor_folder import Piece, pieces

logger = logging.getLogger(__name__)

FORMAT = 3
"""Version of the format. Version 1 had one file each for weights, moving average and optimizer, of one process; version
2 had no hashes."""
OLDEST_FORMAT = 2
"""The oldest version that is still read."""
MAX_STEP = 99_999_999
"""The largest step that a checkpoint's name has room for."""
STATE = "state.json"
OPPONENT, OPPONENT_OPTIMIZER = "opponent", "opponent_optimizer"
"""Folders of the second player."""
_STEP = re.compile(r"step-(\d{8})")


class _State(TypedDict):
    """What ``state.json`` holds, and possibly more."""

    format: int
    step: Annotated[int, Range(0, MAX_STEP)]
    ema_updates: Annotated[int, Range(0, MAX_STEP)]
    files: manifest.Stored


class FormatError(ValueError):
    """A file of another version."""


class Contents(NamedTuple):
    """What this rank writes of a checkpoint."""

    parts: dict[str, dict[str, Piece]]
    """Its pieces of tensors by folder and name."""
    state: dict[str, Any]
    """Further values of ``state.json``."""


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name)) if folder.is_dir() else []


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return _STEP.fullmatch(path.name) is not None


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise FileNotFoundError(f"run: {run} has no checkpoint yet")
    return checkpoints[-1]


def contents_of(
    model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, second: SecondPlayer | None = None
) -> Contents:
    """What this rank writes of a checkpoint. The tensors are those of the arguments, not copies of them."""
    parts = {"model": weights_of(model), **ema.folders, "optimizer": _state_of(model, optimizer)}
    if second is not None:
        parts[OPPONENT] = weights_of(second.network)
        parts[OPPONENT_OPTIMIZER] = _state_of(second.network, second.optimizer)
    return Contents({part: pieces(tensors) for part, tensors in parts.items()}, {"ema_updates": ema.updates})


def save_checkpoint(
    run: Path, step: int, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, keep: int = 2
) -> Path:
    """:func:`write_checkpoint` of the tensors as they are now. A collective."""
    return write_checkpoint(run, step, contents_of(model, ema, optimizer), keep)


def write_checkpoint(run: Path, step: int, contents: Contents, keep: int = 2) -> Path:
    """Writes the checkpoint of ``step`` and deletes all but the newest ``keep`` (0: none of them). A collective.

    Raises:
        OSError: the disk is full or not writable, on any rank. Earlier checkpoints are untouched.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    # Another ending than in hpdm.files: only remove_leftovers, under the run's lock, may take it for a leftover.
    temporary = folder / distributed.broadcast(f".{final.name}.{secrets.token_hex(8)}.new")
    first = distributed.is_first()
    with distributed.raise_on_all_ranks():
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
    try:
        written: Manifest = {}
        with distributed.raise_on_all_ranks():
            for part, own in contents.parts.items():
                written |= tensor_folder.save(own, temporary, part)
        reports = distributed.all_gather(written)
        with distributed.raise_on_all_ranks():
            if first:
                files = {name: about for report in reports for name, about in sorted(report.items())}
                manifest.check_sizes(temporary, files)
                state = {"format": FORMAT, "step": step, **contents.state, "files": manifest.to_json(files)}
                write_json(temporary / STATE, sealed(state))
                for path in (*temporary.glob("*"), temporary):
                    _flush(path)
                if final.exists():
                    _remove(final)
                os.replace(temporary, final)
                _flush(folder)
                for old in list_checkpoints(run)[:-keep]:
                    _remove(old)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _remove(checkpoint: Path) -> None:
    """Deletes a checkpoint. It is renamed first, so that it is never listed without some of its files."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.{secrets.token_hex(8)}.old")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def remove_leftovers(run: Path) -> None:
    """Deletes what a killed process left of checkpoints that it wrote or deleted; call it under the run's lock."""
    folder = run / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".step-") and path.suffix in (".new", ".old"):
            shutil.rmtree(path, ignore_errors=True)


def good_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is as it was written; ``None`` if the run has none at all.

    Newer ones that are damaged are put aside under the name ``damaged-step-N``, which the log tells. Call it under the
    run's lock.

    Raises:
        DamagedError: the run has checkpoints, and all are damaged; they stay where they are.
    """
    checkpoints = list_checkpoints(run)
    damaged: dict[Path, Exception] = {}
    while checkpoints:
        try:
            verify(checkpoints[-1])
            break
        except (DamagedError, FileNotFoundError) as error:
            damaged[checkpoints.pop()] = error
    if damaged and not checkpoints:
        raise DamagedError(
            f"out: no checkpoint of {run} is usable: {'; '.join(map(str, damaged.values()))}; choose another folder"
        )
    for path, reason in damaged.items():
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            aside = aside.with_name(f"{aside.name}-{secrets.token_hex(4)}")
        os.rename(path, aside)
        logger.warning("%s; it is now %s, and the run goes on from %s", reason, aside.name, checkpoints[-1].name)
    return checkpoints[-1] if checkpoints else None


def verify(path: Path, parts: Collection[str] | None = None) -> dict[str, Any]:
    """Checks that a checkpoint's files have the contents that were written; returns its state.

    Args:
        path: the checkpoint.
        parts: the folders of which all bytes are read; ``None`` for all of them.

    Raises:
        DamagedError: they have not.
        FileNotFoundError: a file is missing.
        ValueError: a checkpoint of another format.
    """
    state = read_state(path)
    files = {name: about for name, about in state["files"].items() if parts is None or name.split("/")[0] in parts}
    manifest.check_hashes(path, files)
    return state


def load_checkpoint(
    path: Path,
    model: nn.Module,
    ema: EMA | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    verified: bool = False,
    second: SecondPlayer | None = None,
) -> int:
    """Loads a checkpoint in place and returns its step. Any number of ranks may have written it.

    Args:
        path: the checkpoint.
        model, ema, optimizer, second: what is filled; ``None``: is not.
        verified: the files' hashes have been checked already.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: the checkpoint is damaged, of another format version, or of a model with other parameters.
    """
    folders = ["model", *([] if ema is None else ema.folders), *([] if optimizer is None else ["optimizer"])]
    folders += [] if second is None else [OPPONENT, OPPONENT_OPTIMIZER]
    state = read_state(path) if verified else verify(path, folders)
    load_parameters(model, path / "model")
    if ema is not None:
        for folder, shadow in ema.folders.items():
            tensor_folder.load(shadow, path / folder)
        ema.updates = state["ema_updates"]
    if optimizer is not None:
        _load_optimizer(model, optimizer, path / "optimizer")
    if second is not None:
        load_parameters(second.network, path / OPPONENT)
        _load_optimizer(second.network, second.optimizer, path / OPPONENT_OPTIMIZER)
    return int(state["step"])


def load_initial(path: Path, model: nn.Module, may_lack: tuple[str, ...] = ()) -> None:
    """Starts a model from the weights of a checkpoint's last step, in place.

    Args:
        path: the checkpoint.
        model: may be sharded.
        may_lack: how names of parameters begin that the checkpoint may lack; these stay as they are.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_checkpoint`.
    """
    verify(path, ["model"])
    tensor_folder.load(weights_of(model), path / "model", may_lack)


def load_parameters(model: nn.Module, path: Path) -> None:
    """Fills a model from a folder of a checkpoint, such as ``model`` or ``ema``, in place.

    Raises:
        ValueError: the folder is damaged, or of a model with other parameters.
    """
    tensor_folder.load(weights_of(model), path)


def check_parameters(model: nn.Module, path: Path) -> None:
    """Checks that a folder of a checkpoint holds a model's parameters; the model may be on the meta device.

    Raises:
        ValueError: the folder is damaged, or of a model with other parameters.
    """
    tensor_folder.check(weights_of(model), path)


def read_state(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's ``state.json``, after checking names and sizes of the files that it lists.

    Raises:
        DamagedError: a file is damaged.
        FileNotFoundError: a file is missing.
        ValueError: the format is another one.
    """
    place = path / STATE
    try:
        values = read_json(place, dict[str, Any])
        check_format(path, values)
        if values["format"] > OLDEST_FORMAT or SEAL in values:
            check_seal(values, place)
        state: dict[str, Any] = checked(values, _State, place)
    except ValueError as error:
        if isinstance(error, DamagedError | FormatError):
            raise
        raise DamagedError(f"{error}") from None
    if (number := _STEP.fullmatch(path.resolve().name)) and state["step"] != int(number[1]):
        raise DamagedError(f"{place}: step: got {state['step']}, expected {int(number[1])} as the folder says")
    state["files"] = manifest.parse(state["files"])
    manifest.check_sizes(path, state["files"])
    return state


def check_format(path: Path, values: Mapping[str, Any]) -> None:
    """Checks that ``values``, read from ``path``, have a format that this version reads.

    Raises:
        FormatError: they have another one.
    """
    number = values.get("format", 0)
    if type(number) is not int:
        raise DamagedError(f"{path}: format: got {number!r}, expected an integer")
    if not OLDEST_FORMAT <= number <= FORMAT:
        version = "a newer" if number > FORMAT else "an older"
        raise FormatError(f"{path}: got format {number}, expected {FORMAT}; it is from {version} version")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors for each of the model's parameters; none before its first step."""
    return {f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Creates the optimizer state, which exists only after a first step, sharded like the parameters, and loads it."""
    stored = tensor_folder.stored(path)
    state: dict[Tensor, dict[str, Tensor]] = {}
    for name, p in model.named_parameters():
        keys = [key for key in stored if key.rpartition(".")[0] == name]
        state[p] = {
            key.rpartition(".")[2]: torch.zeros_like(p, requires_grad=False)
            if stored[key].shape == tuple(p.shape)
            else torch.zeros(stored[key].shape)
            for key in keys
        }
    tensor_folder.load(
        {f"{name}.{key}": v for name, p in model.named_parameters() for key, v in state[p].items()}, path
    )
    optimizer.state.update({p: values for p, values in state.items() if values})
