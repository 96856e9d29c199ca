"""A run on disk: its config, and checkpoints that are either whole or absent.

``RUN/config.json``, ``RUN/log.jsonl``, ``RUN/samples/`` and ``RUN/checkpoints/step-00001000/`` with ``state.json`` and
the folders ``model``, ``ema`` and ``optimizer``. These hold safetensors files that ``torch.distributed.checkpoint``
writes, one per process: each saves its share, sharded or not, and any number of processes reads them, one without a
process group too. :func:`export` makes one file of the weights.

A checkpoint is written to a temporary folder, flushed to the disk and renamed, so a killed process or a full disk
leaves the one before it untouched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from hpdm import distributed
from hpdm.files import atomic_path, write_json
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.training.optim import EMA

FORMAT = 2
"""1 had one file for the weights, one for their average and one for the optimizer, all of one process."""
_STEP = re.compile(r"step-(\d{8})")


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name)) if folder.is_dir() else []


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        FileNotFoundError: there is none.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise FileNotFoundError(f"run: {run} has no checkpoint yet")
    return checkpoints[-1]


def save_checkpoint(
    run: Path, step: int, model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer, keep: int = 2
) -> Path:
    """Writes the checkpoint of ``step`` and deletes all but the newest ``keep``. To be called by every process.

    Raises:
        OSError: the disk is full or not writable, for whichever process. The checkpoints before this one are untouched.
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
        for part, tensors in _parts(model, ema, optimizer).items():
            _save_tensors(tensors, temporary / part)
        with distributed.raise_on_all_ranks():
            if first:
                files = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.glob("*/*"))}
                state = {"format": FORMAT, "step": step, "ema_updates": ema.updates, "files": files}
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
    """Loads a checkpoint in place and returns its step, whatever the number of processes that wrote it.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: damaged, from a newer or older version, or of a model with other parameters.
    """
    state = read_state(path)
    _load_tensors(_parameters(model), path / "model")
    if ema is not None:
        _load_tensors(ema.shadow, path / "ema")
        ema.updates = state["ema_updates"]
    if optimizer is not None:
        _load_optimizer(model, optimizer, path / "optimizer")
    return int(state["step"])


def read_state(path: Path) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint says, after a look at the files that it lists.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the format is another one.
    """
    state = _read_json(path / "state.json")
    _check_format(path, state)
    for name, size in state["files"].items():
        if not (path / name).is_file():
            raise FileNotFoundError(f"checkpoint: {path / name} is missing")
        if (path / name).stat().st_size != size:
            raise ValueError(f"{path / name}: damaged (got {(path / name).stat().st_size} bytes, expected {size})")
    return state


def _check_format(path: Path, values: Mapping[str, Any]) -> None:
    found = values.get("format", 0)
    if found != FORMAT:
        version = "a newer" if found > FORMAT else "an older"
        raise ValueError(f"{path}: got format {found}, expected {FORMAT}; it is from {version} version")


def save_run_config(run: Path, config: HPDMConfig, class_names: list[str], training: Mapping[str, Any]) -> None:
    """Writes ``config.json``, what a run is; see :func:`load_run_config`."""
    run.mkdir(parents=True, exist_ok=True)
    values = {"format": FORMAT, "model": config.to_dict(), "classes": class_names, "training": dict(training)}
    write_json(run / "config.json", values)


def load_run_config(run: Path) -> tuple[HPDMConfig, list[str], dict[str, Any]]:
    """The model's config, the names of its classes and the training options of a run.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a damaged config, or one of a newer version.
    """
    if not (run / "config.json").is_file():
        raise FileNotFoundError(f"run: {run} has no config.json, expected the folder that `hpdm train --out` wrote")
    values = _read_json(run / "config.json")
    _check_format(run, values)
    return HPDMConfig.from_dict(values["model"]), list(values["classes"]), dict(values["training"])


def load_model(
    run: Path, *, kernels: str = "auto", device: torch.device | str = "cpu", weights: str = "ema"
) -> tuple[HPDM, list[str], dict[str, Any], int]:
    """The weights of a run's newest checkpoint, of one of its checkpoints, or of an exported file, in eval mode.

    Args:
        run: the run's folder, one of its checkpoints, or what :func:`export` wrote.
        kernels: backend of the ops.
        device: where to put it.
        weights: ``"ema"`` or ``"model"``; an exported file holds one of them.

    Returns:
        The model, the names of its classes, the training options and the checkpoint's step.

    Raises:
        FileNotFoundError: no run, or a run without a checkpoint yet.
        ValueError: unknown ``weights``, damaged files, or another config than the weights'.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights: got {weights!r}, expected 'ema' or 'model'")
    if run.is_file():
        return _load_exported(run, kernels, device, weights)
    given = _STEP.fullmatch(run.resolve().name)
    root = run.resolve().parent.parent if given else run
    config, class_names, training = load_run_config(root)
    checkpoint = run if given else newest_checkpoint(run)
    step = int(read_state(checkpoint)["step"])
    model = HPDM(config, kernels)
    _load_tensors(_parameters(model), checkpoint / weights)
    return model.to(device).eval().requires_grad_(False), class_names, training, step


def export(run: Path, out: Path, weights: str = "ema") -> int:
    """Writes a run's weights, its config and the names of its classes as one safetensors file; returns the step.

    Args:
        run: as for :func:`load_model`.
        out: the file; an existing one is replaced when the new one is whole.
        weights: ``"ema"`` or ``"model"``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`; ``out`` without the suffix or the folder.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out: got {out.name!r}, expected a name ending in .safetensors")
    model, class_names, training, step = load_model(run, weights=weights)
    about = {
        "format": FORMAT, "step": step, "weights": weights, "model": model.config.to_dict(), "classes": class_names,
        "training": training,
    }  # fmt: skip
    with atomic_path(out) as temporary:
        save_file(_parameters(model), temporary, {"hpdm": json.dumps(about)})
    return step


def _load_exported(
    path: Path, kernels: str, device: torch.device | str, weights: str
) -> tuple[HPDM, list[str], dict[str, Any], int]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("hpdm", "null"))
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    if about is None:
        raise ValueError(f"{path}: got a safetensors file without a config, expected one that `hpdm export` wrote")
    _check_format(path, about)
    if about["weights"] != weights:
        raise ValueError(f"weights: got {weights!r}, expected {about['weights']!r}, which is what {path} holds")
    model = HPDM(HPDMConfig.from_dict(about["model"]), kernels)
    model.load_state_dict(load_file(path))
    model = model.to(device).eval().requires_grad_(False)
    return model, list(about["classes"]), dict(about["training"]), int(about["step"])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected a JSON object")
    return values


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _parts(model: nn.Module, ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    moments = {
        f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()
    }
    return {"model": _parameters(model), "ema": ema.shadow, "optimizer": moments}


def _alone() -> bool:
    return distributed.world_size() == 1


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """This process's share of the tensors, as safetensors in the folder ``path``."""
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, no_dist=_alone())
    except CheckpointException as error:
        failed = "; ".join(f"process {rank}: {reason}" for rank, (reason, _) in sorted(error.failures.items()))
        raise OSError(f"checkpoint: {path} cannot be written ({failed})") from error


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        found = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    return {name: tuple(about.size) for name, about in found.items() if hasattr(about, "size")}


def _load_tensors(targets: Mapping[str, Tensor], path: Path) -> None:
    """Fills the targets, of which this process may hold shards; it reads no more than these."""
    stored = _stored_shapes(path)
    lacking, extra = sorted(set(targets) - set(stored)), sorted(set(stored) - set(targets))
    if lacking or extra:
        raise ValueError(f"{path}: of another config: lacks {lacking[:3]}, has {extra[:3]} more")
    for name, target in targets.items():
        if tuple(target.shape) != stored[name]:
            raise ValueError(f"{path}: of another config: {name} has shape {stored[name]}, not {tuple(target.shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        # Each process reads by itself: it needs nothing of the others.
        dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Makes what a first step would make, shaped and sharded like the parameters, and fills it."""
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
