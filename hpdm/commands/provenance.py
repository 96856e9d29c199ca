"""What a run's curve depends on besides its options: its clips, the code, the versions of libraries, the processes.

All ranks must have the same, and a run that goes on must have the clips that it began with. The rest may change; the
log then names it, since the curve changes by rounding or more.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hpdm
import hpdm_kernels
from hpdm import distributed, runs
from hpdm.training.inputs import LATENTS, VALIDATION, Inputs
from hpdm.training.options import TrainOptions

logger = logging.getLogger(__name__)

_HELD_OUT = ("validation", "validation_split")  # options that name other clips for the validation
_DECORDS = ("decord", "decord2", "eva-decord")  # packages with a module of that name


def sources() -> dict[str, str]:
    """A hash of each source file of the two packages, by its name."""
    folders = [Path(package.__path__[0]) for package in (hpdm, hpdm_kernels)]
    return {
        path.relative_to(folder.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
    }


def versions() -> dict[str, str]:
    """Versions of what computes, draws and decodes."""
    import av  # deferred: it loads the codecs

    found = {
        "hpdm": hpdm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }
    for name in _DECORDS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """What a run records of the code and the processes."""
    code = hashlib.sha256(json.dumps(sources()).encode()).hexdigest()[:16]
    processes = {"processes": distributed.world_size(), "threads": torch.get_num_threads()}
    return {**versions(), "sources": code, **processes}


def of_run(inputs: Inputs) -> dict[str, Any]:
    """What a run's config keeps: its inputs, the code and the processes."""
    return {"inputs": inputs.fingerprints, "environment": environment()}


def assert_same_code_on_all_ranks() -> None:
    """Checks that every rank runs the same sources with the same libraries. A collective.

    Raises:
        ValueError: the ranks differ; raised on every rank.
    """
    distributed.assert_same_on_all_ranks("code", sources())
    distributed.assert_same_on_all_ranks("versions", versions())


def changed_inputs(options: TrainOptions, inputs: Inputs) -> dict[str, tuple[str, str]]:
    """``(before, now)`` of the inputs that differ from those of the run to resume, for its history.

    The log names what else is different: versions, code, processes.

    Raises:
        ValueError: inputs differ, and neither ``data_changed`` nor another folder for the validation asks for that.
    """
    training = runs.load_run_config(options.out).training
    if "provenance" not in training:
        _log_once(
            "%s has no record of its clips and versions, as runs of earlier versions have none: it is made now",
            options.out,
        )
        return {}
    before, then = _recorded(options.out, training)
    now = inputs.fingerprints
    refused = {} if options.data_changed else inputs.changes(options.out, before)
    if any(training.get(name) != _text(getattr(options.steering, name)) for name in _HELD_OUT):
        refused = {name: text for name, text in refused.items() if not name.startswith(VALIDATION)}
    if refused:
        raise ValueError(
            f"{'; '.join(f'{name}: {text}' for name, text in refused.items())}; expected what the run at {options.out} "
            "had, or --data-changed to go on with this"
        )
    here = environment()
    names = dict.fromkeys([*then, *here])
    differing = [f"{name}: {then.get(name)} -> {here.get(name)}" for name in names if then.get(name) != here.get(name)]
    if differing:
        _log_once("%s goes on with %s", options.out, ", ".join(differing))
    changed = {name: (before[name], now[name]) for name in now if before.get(name, now[name]) != now[name]}
    if (LATENTS in before) != (LATENTS in now):
        changed[LATENTS] = (before.get(LATENTS, "none"), now.get(LATENTS, "none"))
    return changed


def _recorded(run: Path, training: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """The inputs and the environment that a run's config has; ``ValueError`` for a damaged one."""
    match training["provenance"]:
        case {"inputs": dict(inputs), "environment": dict(environment)}:
            return inputs, environment
        case other:
            raise ValueError(f"{run / 'config.json'}: provenance: got {other!r}, expected inputs and environment")


def _log_once(message: str, *values: object) -> None:
    if distributed.is_first():
        logger.info(message, *values)


def _text(value: object) -> str | None:
    """An option as a config has it."""
    return None if value is None else str(value)
