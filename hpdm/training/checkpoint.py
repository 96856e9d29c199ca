"""Checkpoints of a training run, written atomically: each is either complete or absent.

``RUN/checkpoints/step-00001000/`` holds ``state.json`` and the folders ``model``, ``ema`` and ``optimizer``, and with
several moving averages one more for each after the first (``ema-0.100``, by its width). These hold safetensors files in
the layout of ``torch.distributed.checkpoint``. Sharded tensors have a file per rank: each rank saves its shards. Whole
tensors, which every rank has, are in one file, which rank 0 writes. Any number of ranks can read either, including a
single process without a process group.

A checkpoint is written to a temporary folder, flushed to the disk and renamed, so a killed process or a full disk
leaves the previous checkpoint untouched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from hpdm import distributed
from hpdm.files import write_json
from hpdm.json_file import Range, checked, read_json
from hpdm.tensor_file import write_tensors
from hpdm.training.ema import EMA

FORMAT = 2
"""Version of the format. Version 1 had one file each for weights, moving average and optimizer, of one process."""
MAX_STEP = 99_999_999
"""The largest step that a checkpoint's name has room for."""
_STEP = re.compile(r"step-(\d{8})")
_WHOLE_FILE = "shard-00001-model-00001-of-00001.safetensors"
"""The name that ``torch.distributed.checkpoint`` gives to the file of a single rank."""


class _State(TypedDict):
    """What ``state.json`` holds, and possibly more."""

    format: int
    step: Annotated[int, Range(0, MAX_STEP)]
    ema_updates: Annotated[int, Range(0, MAX_STEP)]
    files: Annotated[dict[Annotated[str, Range(1, 255)], Annotated[int, Range(0, 2**62)]], Range(1, 10**6)]


class Contents(NamedTuple):
    """What a checkpoint holds."""

    parts: dict[str, dict[str, Tensor]]
    """Tensors by folder and name."""
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


def contents_of(model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> Contents:
    """The contents of a checkpoint. The tensors are those of the arguments, not copies of them."""
    optimizer_state = {
        f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()
    }
    parts = {"model": parameters_of(model), **ema.folders, "optimizer": optimizer_state}
    return Contents(parts, {"ema_updates": ema.updates})


def save_checkpoint(
    run: Path, step: int, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, keep: int = 2
) -> Path:
    """:func:`write_checkpoint` of the tensors as they are now. A collective."""
    return write_checkpoint(run, step, contents_of(model, ema, optimizer), keep)


def write_checkpoint(run: Path, step: int, contents: Contents, keep: int = 2) -> Path:
    """Writes the checkpoint of ``step`` and deletes all but the newest ``keep``. A collective.

    Raises:
        OSError: the disk is full or not writable, on any rank. Earlier checkpoints are untouched.
    """
    folder = run / "checkpoints"
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    first = distributed.is_first()
    with distributed.raise_on_all_ranks():
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
    try:
        for part, tensors in contents.parts.items():
            _save_tensors(tensors, temporary / part)
        with distributed.raise_on_all_ranks():
            if first:
                files = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.glob("*/*"))}
                state = {"format": FORMAT, "step": step, **contents.state, "files": files}
                write_json(temporary / "state.json", state)
                for path in (*temporary.glob("*"), temporary):
                    _flush(path)
                if final.exists():
                    shutil.rmtree(final)
                os.replace(temporary, final)
                _flush(folder)
                for old in list_checkpoints(run)[:-keep]:
                    shutil.rmtree(old)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def load_checkpoint(
    path: Path, model: nn.Module, ema: EMA | None = None, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Loads a checkpoint in place and returns its step. Any number of ranks may have written it.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: the checkpoint is damaged, of another format version, or of a model with other parameters.
    """
    state = read_state(path)
    load_parameters(model, path / "model")
    if ema is not None:
        for folder, shadow in ema.folders.items():
            _load_tensors(shadow, path / folder)
        ema.updates = state["ema_updates"]
    if optimizer is not None:
        _load_optimizer(model, optimizer, path / "optimizer")
    return int(state["step"])


def load_parameters(model: nn.Module, path: Path) -> None:
    """Fills a model from a folder of a checkpoint, such as ``model`` or ``ema``, in place.

    Raises:
        ValueError: the folder is damaged, or of a model with other parameters.
    """
    _load_tensors(parameters_of(model), path)


def check_parameters(model: nn.Module, path: Path) -> None:
    """Checks that a folder of a checkpoint holds a model's parameters; the model may be on the meta device.

    Raises:
        ValueError: the folder is damaged, or of a model with other parameters.
    """
    parameters = parameters_of(model)
    _check_stored(parameters, path)
    for name, about in _stored_tensors(path).items():
        if about.properties.dtype != parameters[name].dtype:
            got, expected = about.properties.dtype, parameters[name].dtype
            raise ValueError(f"{path}: of another config: {name} has numbers of {got}, not {expected}")


def read_state(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint's ``state.json``, after checking the sizes of the files that it lists.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the format is another one.
    """
    values = read_json(path / "state.json", dict[str, Any])
    check_format(path, values)
    state: dict[str, Any] = checked(values, _State, f"{path / 'state.json'}")
    if (number := _STEP.fullmatch(path.resolve().name)) and state["step"] != int(number[1]):
        raise ValueError(
            f"{path / 'state.json'}: step: got {state['step']}, expected {int(number[1])} as the folder says"
        )
    for name, size in state["files"].items():
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{path / 'state.json'}: files: got {name!r}, expected names inside of the checkpoint")
        if not (path / name).is_file():
            raise FileNotFoundError(f"checkpoint: {path / name} is missing")
        if (path / name).stat().st_size != size:
            raise ValueError(f"{path / name}: damaged (got {(path / name).stat().st_size} bytes, expected {size})")
    return state


def check_format(path: Path, values: Mapping[str, Any]) -> None:
    """Checks that ``values``, read from ``path``, have this version's format.

    Raises:
        ValueError: they have another one.
    """
    number = checked(values.get("format", 0), int, f"{path}: format")
    if number != FORMAT:
        version = "a newer" if number > FORMAT else "an older"
        raise ValueError(f"{path}: got format {number}, expected {FORMAT}; it is from {version} version")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, without gradients."""
    return {name: p.detach() for name, p in model.named_parameters()}


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether each rank holds only its shards of the tensors."""
    return any(isinstance(t, DTensor) for t in tensors)


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors as safetensors into the folder ``path``: each rank its shards, or rank 0 alone. A collective."""
    if is_sharded(tensors.values()):
        _save_shards(tensors, path)
        return
    with distributed.raise_on_all_ranks():
        if distributed.is_first():
            _save_whole(tensors, path)


def _save_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes whole tensors as ``torch.distributed.checkpoint`` does for a single rank.

    Unlike it, this streams the tensors to the file instead of copying them into one string of bytes, which would need
    the memory twice and keep other threads waiting.
    """
    offsets = {name: {"saved_offsets": [0] * t.ndim} for name, t in tensors.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    path.mkdir()
    try:
        write_tensors(path / _WHOLE_FILE, tensors, metadata)
    except OSError as error:
        raise OSError(f"checkpoint: {path} cannot be written ({error})") from error


def _save_shards(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes this rank's shards of the tensors. A collective."""
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, no_dist=distributed.world_size() == 1)
    except CheckpointException as error:
        failed = "; ".join(f"process {rank}: {reason}" for rank, (reason, _) in sorted(error.failures.items()))
        raise OSError(f"checkpoint: {path} cannot be written ({failed})") from error


def _stored_tensors(path: Path) -> dict[str, TensorStorageMetadata]:
    """Sizes and dtypes of the tensors in a folder of safetensors files, by name."""
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        # PyTorch reads the JSON in the headers without checking it.
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    return {name: about for name, about in metadata.items() if isinstance(about, TensorStorageMetadata)}


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(about.size) for name, about in _stored_tensors(path).items()}


def _check_stored(targets: Mapping[str, Tensor], path: Path) -> None:
    stored = _stored_shapes(path)
    missing, extra = sorted(set(targets) - set(stored)), sorted(set(stored) - set(targets))
    if missing or extra:
        raise ValueError(f"{path}: of another config: lacks {missing[:3]}, has {extra[:3]} more")
    for name, target in targets.items():
        if tuple(target.shape) != stored[name]:
            raise ValueError(f"{path}: of another config: {name} has shape {stored[name]}, not {tuple(target.shape)}")


def _load_tensors(targets: Mapping[str, Tensor], path: Path) -> None:
    """Fills the targets in place. Of sharded targets this rank reads only its shards."""
    _check_stored(targets, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        # No collective: each rank reads what it needs by itself.
        dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Creates the optimizer state, which exists only after a first step, sharded like the parameters, and loads it."""
    stored = _stored_shapes(path)
    state: dict[Tensor, dict[str, Tensor]] = {}
    for name, p in model.named_parameters():
        keys = [key for key in stored if key.rpartition(".")[0] == name]
        state[p] = {
            key.rpartition(".")[2]: torch.zeros_like(p, requires_grad=False)
            if stored[key] == tuple(p.shape)
            else torch.zeros(stored[key])
            for key in keys
        }
    _load_tensors({f"{name}.{key}": v for name, p in model.named_parameters() for key, v in state[p].items()}, path)
    optimizer.state.update({p: values for p, values in state.items() if values})
