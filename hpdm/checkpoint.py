"""A run on disk: its config, and checkpoints that are either whole or absent.

``RUN/config.json``, ``RUN/log.jsonl``, ``RUN/samples/`` and ``RUN/checkpoints/step-00001000/`` with ``model``, ``ema``,
``optimizer.safetensors`` and ``state.json``. A checkpoint is written to a temporary folder, flushed to the disk and
renamed, so a killed process or a full disk leaves the one before it untouched.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpdm.config import HPDMConfig
from hpdm.model import HPDM
from hpdm.optim import EMA

FORMAT = 1
_STEP = re.compile(r"step-(\d{8})")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON to a temporary file, then renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    """Writes the checkpoint of ``step`` and deletes all but the newest ``keep``.

    Raises:
        OSError: the disk is full or not writable. The checkpoints before this one are untouched.
    """
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        _save_tensors(dict(model.named_parameters()), temporary / "model.safetensors")
        _save_tensors(ema.shadow, temporary / "ema.safetensors")
        _save_tensors(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        write_json(temporary / "state.json", {"format": FORMAT, "step": step, "ema_updates": ema.updates})
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush(folder)
    except SafetensorError as error:
        raise OSError(f"checkpoint of step {step}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    path: Path, model: nn.Module, ema: EMA | None = None, optimizer: torch.optim.Optimizer | None = None
) -> int:
    """Loads a checkpoint in place and returns its step.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: damaged, from a newer version, or of a model with other parameters.
    """
    state = _read_json(path / "state.json")
    if state.get("format", 0) > FORMAT:
        raise ValueError(f"{path}: got format {state['format']}, expected at most {FORMAT}; it is from a newer version")
    _load_tensors(dict(model.named_parameters()), path / "model.safetensors")
    if ema is not None:
        _load_tensors(ema.shadow, path / "ema.safetensors")
        ema.updates = state["ema_updates"]
    if optimizer is not None:
        _load_optimizer(optimizer, path / "optimizer.safetensors")
    return int(state["step"])


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
    if values.get("format", 0) > FORMAT:
        raise ValueError(f"{run}: got format {values['format']}, expected at most {FORMAT}; it is from a newer version")
    return HPDMConfig.from_dict(values["model"]), list(values["classes"]), dict(values["training"])


def load_model(
    run: Path, *, kernels: str = "auto", device: torch.device | str = "cpu", weights: str = "ema"
) -> tuple[HPDM, list[str], dict[str, Any], int]:
    """The newest checkpoint of a run (or the checkpoint itself, given its folder) as a model in eval mode.

    Args:
        run: the run's folder, or one of its checkpoints.
        kernels: backend of the ops.
        device: where to put it.
        weights: ``"ema"`` or ``"model"``.

    Returns:
        The model, the names of its classes, the training options and the checkpoint's step.

    Raises:
        FileNotFoundError: no run, or a run without a checkpoint yet.
        ValueError: unknown ``weights``, damaged files, or another config than the weights'.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f"weights: got {weights!r}, expected 'ema' or 'model'")
    given = _STEP.fullmatch(run.resolve().name)
    root = run.resolve().parent.parent if given else run
    config, class_names, training = load_run_config(root)
    checkpoint = run if given else newest_checkpoint(run)
    model = HPDM(config, kernels)
    _load_tensors(dict(model.named_parameters()), checkpoint / f"{weights}.safetensors")
    step = int(_read_json(checkpoint / "state.json")["step"])
    return model.to(device).eval().requires_grad_(False), class_names, training, step


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


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path)


def _load_tensors(targets: Mapping[str, Tensor], path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} is missing")
    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    lacking, extra = sorted(set(targets) - set(loaded)), sorted(set(loaded) - set(targets))
    if lacking or extra:
        raise ValueError(f"{path}: of another config: lacks {lacking[:3]}, has {extra[:3]} more")
    for name, target in targets.items():
        if target.shape != loaded[name].shape:
            raise ValueError(
                f"{path}: of another config: {name} has shape {tuple(loaded[name].shape)}, not {tuple(target.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(loaded[name])


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: {path} is missing")
    state: dict[int, dict[str, Tensor]] = {}
    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error})") from error
    for key, value in loaded.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
