"""Training runs on disk: loading one as a model with its config, and exporting its weights as one file.

``RUN/config.json`` names the system and holds the model's config, the names of its classes and the training options.
``RUN/checkpoints`` is described in :mod:`hpdm.training.checkpoint`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from hpdm import published, systems
from hpdm.checks import check_choice
from hpdm.data.class_names import check_class_name
from hpdm.files import atomic_path, make_folder, write_json
from hpdm.integrity import SEAL, DamagedError, check_seal, hash_of_file, hash_of_json, sealed
from hpdm.json_file import Range, checked, parse_json, read_json
from hpdm.system import System
from hpdm.tensor_file import DTYPES, FilePrecision, TensorFile, write_tensors
from hpdm.training.checkpoint import (
    FORMAT,
    MAX_STEP,
    OLDEST_FORMAT,
    check_format,
    check_parameters,
    is_checkpoint,
    list_checkpoints,
    load_parameters,
    newest_checkpoint,
    verify,
)
from hpdm.training.ema import folder_of_weights
from hpdm.training.stored import weights_of
from hpdm.training.tensor_folder import first_not_finite

logger = logging.getLogger(__name__)

MOST_DELETED = 20
"""Number of checkpoints in a row that may be deleted while they are read."""
FIRST_SYSTEM = "patch"
"""The system of runs whose config names none: older versions had only this one."""


class _Training(TypedDict, total=False):
    """Types of those training options that are used of a run that is loaded; runs of earlier versions lack some."""

    stride: Annotated[int, Range(1, 2**20)]
    fps: Annotated[float, Range(1e-6, 1e6)] | None
    short: Literal["error", "skip", "loop"]
    clean_context: Annotated[float, Range(0, 1)]
    preset: str
    ema: list[float] | float
    micro_batch: Annotated[int, Range(1, 2**31)]
    data_weights: list[float]
    history: list[dict[str, Any]]


class _RunFile(TypedDict):
    """What ``config.json`` and the header of an exported file hold."""

    format: int
    model: dict[str, Any]
    classes: list[Any]
    training: _Training


class _ExportedFile(_RunFile):
    """What the header of an exported file holds."""

    step: Annotated[int, Range(0, MAX_STEP)]
    weights: Annotated[str, Range(1, 64)]


class RunConfig(NamedTuple):
    """The contents of a run's ``config.json``."""

    system: System
    config: Any
    """The model's."""
    classes: list[str]
    """Names of the classes, in the order of the labels; empty for a model without classes."""
    training: dict[str, Any]
    """The options of training."""


class Run(NamedTuple):
    """A trained model, loaded."""

    model: nn.Module
    """In eval mode, without gradients."""
    config: Any
    """The model's."""
    classes: list[str]
    """Names of the classes, in the order of the labels; empty for a model without classes."""
    training: dict[str, Any]
    """The options of training."""
    step: int
    """Number of training steps of the weights."""
    system: System
    digest: str = ""
    """A hash of the weights and the model's config, on which a sample depends besides its options; empty for a model
    that was not loaded."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


def save_run_config(run: Path, run_config: RunConfig) -> None:
    """Writes ``config.json`` into the folder ``run``, which is made if it is not there."""
    make_folder("out", run)
    values = json.loads(json.dumps({"format": FORMAT, **_to_json(run_config)}))  # tuples become lists, as when read
    write_json(run / "config.json", sealed(values))


def load_run_config(run: Path) -> RunConfig:
    """Reads ``config.json``.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a damaged config, one of a newer version, or one with a class name that is not safe.
    """
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"run: {run} has no config.json, expected the folder that `hpdm train --out` wrote, or one of the weights "
            f"that come with the package ({', '.join(published.names()) or 'none'})"
        )
    values = read_json(path, dict[str, Any])
    check_format(run, values)
    if values["format"] > OLDEST_FORMAT or SEAL in values:
        check_seal(values, path)
    return _from_json(checked(values, _RunFile, f"{path}"), path)


def load(
    path: str | os.PathLike[str], *, kernels: str = "auto", device: torch.device | str = "cpu", weights: str = "ema"
) -> Run:
    """Loads a model from a run's newest checkpoint, from one of its checkpoints, from an exported file, or by name.

    Args:
        path: the run's folder, one of its checkpoints, a file that :func:`export` wrote, or the name of weights that
            come with this package (:mod:`hpdm.published`), unless a folder or file is called so.
        kernels: backend of the ops, ``"auto" | "reference" | "torch" | "triton"``.
        device: where to put the model.
        weights: ``"ema"`` for the run's first moving average, ``"ema-0.10"`` for that of a width, ``"model"`` for the
            weights of the last step; an exported file holds one of them.

    Raises:
        FileNotFoundError: no run, or a run without a checkpoint yet.
        ValueError: ``weights`` that the run does not have, damaged files, or a config that does not match the weights.
            Of a run whose newest checkpoint is damaged the one before is taken, which the log tells.
    """
    path = published.find(path) or Path(path)
    if path.is_file():
        return _load_exported(path, kernels, device, weights)
    path_is_checkpoint = is_checkpoint(path.resolve())
    run_config = load_run_config(path.resolve().parent.parent if path_is_checkpoint else path)
    folder = folder_of_weights(weights, _widths(run_config.training))
    if path_is_checkpoint:
        return _load_checkpoint(path, run_config, folder, kernels, device)
    checkpoint, damaged, deleted = newest_checkpoint(path), set[Path](), 0
    while True:
        try:
            return _load_checkpoint(checkpoint, run_config, folder, kernels, device)
        except (DamagedError, FileNotFoundError) as error:
            if not checkpoint.exists() and deleted < MOST_DELETED:
                deleted += 1  # by a training that goes on, once it has written newer ones
            else:
                damaged.add(checkpoint)
            left = [other for other in list_checkpoints(path) if other not in damaged]
            if not left:
                raise
            if checkpoint in damaged:
                logger.warning("%s; taking %s", error, left[-1].name)
            checkpoint = left[-1]


def _load_checkpoint(
    checkpoint: Path, run_config: RunConfig, folder: str, kernels: str, device: torch.device | str
) -> Run:
    """Loads the weights in one folder of a checkpoint.

    Raises:
        DamagedError: they are not as they were written.
        FileNotFoundError, ValueError: as :func:`load`.
    """
    state = verify(checkpoint, [folder])
    check_parameters(_without_memory(run_config), checkpoint / folder)
    model = run_config.system.build(run_config.config, kernels)
    load_parameters(model, checkpoint / folder)
    files = {
        name: about.sha256 or hash_of_file(checkpoint / name)
        for name, about in state["files"].items()
        if name.split("/")[0] == folder
    }
    return _loaded_run(model, run_config, state["step"], device, files)


def export(run: Path, out: Path, weights: str = "ema", precision: FilePrecision = "fp32") -> int:
    """Writes a run's weights, its config and the names of its classes as one safetensors file; returns the step.

    Args:
        run: as for :func:`load`.
        out: the file; an existing one is replaced once the new one is complete.
        weights: as for :func:`load`.
        precision: of the numbers in the file. Loading brings them back to the model's own.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`; an unknown precision; ``out`` has another suffix, or its folder
            does not exist.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out: got {out.name!r}, expected a name ending in .safetensors")
    check_choice("precision", precision, FilePrecision)
    loaded = load(run, weights=weights)
    run_config = RunConfig(loaded.system, loaded.config, loaded.classes, loaded.training)
    folder = folder_of_weights(weights, _widths(loaded.training))
    write_weights(out, weights_of(loaded.model), run_config, loaded.step, folder, DTYPES[precision])
    return loaded.step


def write_weights(
    out: Path,
    tensors: Mapping[str, Tensor],
    run_config: RunConfig,
    step: int,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the file of :func:`export` from weights that are at hand, atomically.

    Args:
        out: the file, ending in ``.safetensors``.
        tensors: the weights by the names of the model's parameters and persistent buffers, on the CPU.
        run_config: what else the file holds.
        step: number of training steps of the weights.
        weights: what they are, ``"ema"`` or ``"model"``.
        dtype: of the file; ``None`` for that of the tensors. Loading brings them back to the model's own.

    Raises:
        OSError: the file cannot be written, e.g. as the disk is full; nothing is left of it.
    """
    header = {"format": FORMAT, "step": step, "weights": weights, **_to_json(run_config)}
    stored = {name: t.to(dtype or t.dtype) for name, t in tensors.items()}
    with atomic_path(out) as temporary:
        write_tensors(temporary, stored, {"hpdm": json.dumps(header)}, hashed=True)


def _widths(training: Mapping[str, Any]) -> list[float]:
    """Relative widths of a run's moving averages; none for one with a constant decay, which older runs have."""
    widths = training.get("ema")
    return list(widths) if isinstance(widths, list) else []


def start_from_exported(model: nn.Module, path: Path, may_lack: tuple[str, ...] = ()) -> None:
    """Starts a model from the weights in a file that :func:`export` wrote, in place.

    Args:
        model: whole, not sharded.
        path: the file.
        may_lack: how names of parameters begin that the file may lack; these stay as they are.

    Raises:
        ValueError: a damaged file, or one of a model with other parameters.
    """
    with TensorFile(path) as file:
        parameters = weights_of(model)
        lacking = {name for name in parameters if may_lack and name.startswith(may_lack) and name not in file.shapes}
        file.check({name: (tuple(p.shape), p.dtype) for name, p in parameters.items() if name not in lacking})
        _fill(model, file, lacking)


@torch.no_grad()
def _fill(model: nn.Module, file: TensorFile, lacking: Collection[str] = ()) -> None:
    """Fills a model from a file that has its parameters but the ``lacking`` ones.

    Raises:
        DamagedError: a tensor is damaged, or holds numbers that are not finite.
    """
    parameters = weights_of(model)
    for name, parameter in parameters.items():
        if name not in lacking:
            parameter.copy_(file.read(name))
    broken = first_not_finite(parameters)
    if broken is not None:
        raise DamagedError(f"{file.path}: {broken}: got NaN or infinity, expected finite weights")


def _load_exported(path: Path, kernels: str, device: torch.device | str, weights: str) -> Run:
    with TensorFile(path) as file:
        if "hpdm" not in file.metadata:
            raise ValueError(f"{path}: got a safetensors file without a config, expected one that `hpdm export` wrote")
        header = parse_json(file.metadata["hpdm"], dict[str, Any], path)
        check_format(path, header)
        if header["format"] > OLDEST_FORMAT and file.hashes is None:
            raise DamagedError(f"{path}: damaged (it has no hashes)")
        header = checked(header, _ExportedFile, f"{path}")
        run_config = _from_json(header, path)
        if header["weights"] != folder_of_weights(weights, _widths(run_config.training)):
            raise ValueError(f"weights: got {weights!r}, expected {header['weights']!r}, which is what {path} holds")
        file.check({name: (tuple(t.shape), t.dtype) for name, t in weights_of(_without_memory(run_config)).items()})
        model = run_config.system.build(run_config.config, kernels)
        _fill(model, file)
        weights_hash = hash_of_file(path) if file.hashes is None else hash_of_json(file.hashes)
    return _loaded_run(model, run_config, header["step"], device, weights_hash)


def _without_memory(run_config: RunConfig) -> nn.Module:
    """The model of a config that may be a stranger's, without memory for its weights."""
    with torch.device("meta"):
        return run_config.system.build(run_config.config)


def _loaded_run(model: nn.Module, run_config: RunConfig, step: int, device: torch.device | str, hashes: Any) -> Run:
    """A run from a model that has its weights, whose ``hashes`` are a JSON value."""
    system, config, classes, training = run_config
    about = _to_json(run_config)
    digest = hash_of_json([hashes, about["system"], about["model"]])
    return Run(model.to(device).eval().requires_grad_(False), config, classes, training, step, system, digest)


def _to_json(run_config: RunConfig) -> dict[str, Any]:
    system, config, classes, training = run_config
    return {"system": system.name, "model": config.to_dict(), "classes": classes, "training": dict(training)}


def _from_json(values: Mapping[str, Any], path: Path) -> RunConfig:
    # They become parts of file names, and the file may be a stranger's.
    classes = [check_class_name(name, f"{path}: class {label}") for label, name in enumerate(values["classes"])]
    try:
        system = systems.get(values.get("system", FIRST_SYSTEM))
        config = system.config_from_dict(values["model"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if config.conditioning == "class" and len(classes) > config.classes:
        raise ValueError(f"{path}: classes: got {len(classes)} names, expected at most {config.classes}, as in model")
    return RunConfig(system, config, classes, dict(values["training"]))
