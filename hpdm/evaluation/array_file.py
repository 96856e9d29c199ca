"""Files of arrays that evaluations keep for the next one, each with what its contents depend on."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpdm.files import atomic_path
from hpdm.json_file import parse_json


def write_arrays(path: Path, identity: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Writes ``arrays`` and their identity, atomically; makes the folder.

    Args:
        path: the npz file.
        identity: everything that the arrays depend on, as JSON values.
        arrays: arrays or numbers by name, none of it ``identity``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        np.savez(temporary, **{"identity": np.array(json.dumps(identity)), **arrays})


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The identity and the arrays of a file.

    Raises:
        Exception: it is damaged, or was not written by :func:`write_arrays`. numpy raises errors of many types.
    """
    # It is written uncompressed. A compressed one could ask for any amount of memory.
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("compressed")
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    return parse_json(str(arrays.pop("identity")), dict[str, Any], "identity"), arrays
