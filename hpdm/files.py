"""Writing files and folders atomically: under its final name, a file is always complete.

Each is written under a temporary name in the same folder and then renamed. A temporary name starts with a dot, which
readers of folders skip.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path for a file; renames it to ``path`` on success, deletes it on failure.

    The temporary name has the suffix of ``path``, from which many writers choose the format.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new temporary folder; renames it to ``path`` on success, deletes it with its contents on failure.

    Raises:
        FileNotFoundError: the folder that is to hold ``path`` does not exist.
        OSError: on success, ``path`` is a file or a folder that is not empty.
    """
    path = Path(path).absolute()
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 ``text`` to ``path`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes ``value`` to ``path`` as indented JSON, atomically and flushed to the disk before the renaming."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected a JSON object")
    return values


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process or call uses."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: folder {path.parent} does not exist, cannot write {path.name}")
    return path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
