"""The finished parts of an ``hpdm sample``, kept on disk so that the command can resume after an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hpdm.files import atomic_path
from hpdm.tensor_file import TensorFile, write_tensors

FOLDER = ".unfinished"
"""Folder of the finished parts, in the folder of the videos."""


def path_of(out: Path, identity: Mapping[str, Any]) -> Path:
    """The file for one call of the sampler, named by a hash of ``identity``: everything that its videos depend on."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return out / FOLDER / f"{key}.safetensors"


def read(path: Path) -> list[Tensor]:
    """The videos of the finished parts, ``[B, C, F, H, W]`` each; an empty list if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return []
    try:
        with TensorFile(path) as file:
            names = [str(n) for n in range(len(file.shapes))]
            if set(names) != set(file.shapes):
                raise ValueError(f"{path}: got tensors {sorted(file.shapes)[:3]}, expected {names[:3]}")
            parts = [file.read(name) for name in names]
            if not all(part.isfinite().all() for part in parts):
                raise ValueError(f"{path}: got NaN or infinity, expected finite videos")
            return parts
    except ValueError as error:
        raise ValueError(f"out: the finished part of an interrupted run is damaged, delete it: {error}") from None


def write(path: Path, parts: list[Tensor]) -> None:
    """Writes the videos of the finished parts, atomically."""
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        write_tensors(temporary, {str(n): videos for n, videos in enumerate(parts)}, {})


def clear(out: Path) -> None:
    """Deletes all finished parts; called once all videos are written."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)
