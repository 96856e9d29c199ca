"""The finished parts of an ``hpdm sample``, kept on disk so that the command can resume after an interruption.

They are named by a hash of everything that the videos depend on, the weights included. Several commands may sample into
one folder; each holds a lock for its own parts.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from hpdm.files import atomic_path, delete_leftovers
from hpdm.integrity import hash_of_json
from hpdm.lock import FolderLock
from hpdm.tensor_file import TensorFile, write_tensors

FOLDER = ".unfinished"
"""Folder of the finished parts, in the folder of the videos."""


class Unfinished:
    """The finished parts of one command, on rank 0. A context manager, which releases their locks.

    Args:
        out: the folder of the videos.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._locks = ExitStack()
        self._paths: list[Path] = []

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._locks.close()
        with contextlib.suppress(OSError):
            (self.out / FOLDER).rmdir()  # fails unless it is empty

    def open(self, identity: Mapping[str, Any]) -> Path:
        """The file of one call of the sampler, which is named by ``identity``: all that its videos depend on.

        Raises:
            LockedError: another command samples the same videos into the same folder.
        """
        key = hash_of_json(identity)[:32]
        lock = FolderLock(self.out / FOLDER, "out", "hpdm sample", f"{key}.lock", f"the same sampling into {self.out}")
        self._locks.enter_context(lock)
        delete_leftovers(self.out / FOLDER)
        self._paths.append(self.out / FOLDER / f"{key}.safetensors")
        return self._paths[-1]

    def remove(self) -> None:
        """Deletes the parts; called once all videos are written."""
        for path in self._paths:
            path.unlink(missing_ok=True)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def read(path: Path) -> list[Tensor]:
    """The videos of the finished parts, ``[B, C, F, H, W]`` each; an empty list if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    parts = read_state(path)
    names = [str(n) for n in range(len(parts))]
    check_names(path, parts, names)
    return [parts[name] for name in names]


def write(path: Path, parts: list[Tensor]) -> None:
    """Writes the videos of the finished parts, as :func:`write_state`."""
    write_state(path, {str(n): videos for n, videos in enumerate(parts)})


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors that :func:`write_state` wrote; none if there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        with TensorFile(path) as file:
            if file.hashes is None:
                raise ValueError(f"{path}: got no hashes, expected some")
            state = {name: file.read(name) for name in file.shapes}
            if not all(tensor.isfinite().all() for tensor in state.values()):
                raise ValueError(f"{path}: got NaN or infinity, expected finite videos")
            return state
    except ValueError as error:
        raise ValueError(damaged(path, error)) from None


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes what an interrupted command goes on from, atomically.

    Raises:
        OSError: it cannot be written; the one before stays.
    """
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        write_tensors(temporary, state, {}, hashed=True)


def check_names(path: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Checks that a file holds the tensors that were written.

    Raises:
        ValueError: others.
    """
    if set(found) != set(expected):
        got, wanted = sorted(set(found) - set(expected)), sorted(set(expected) - set(found))
        raise ValueError(damaged(path, f"got {got[:3]} too many, and lacks {wanted[:3]}"))


def damaged(path: Path, reason: object) -> str:
    """The message of an error: what an interrupted command left in ``path`` and beside it cannot be used."""
    place = "" if str(path) in str(reason) else f"{path}: "
    return f"out: the finished part of an interrupted run is damaged, delete it: {place}{reason}"
