"""Writing files and folders atomically: under its final name, a file is always complete.

Each is written under a temporary name in the same folder and then renamed. A temporary name starts with a dot, which
readers of folders skip.
"""

from __future__ import annotations

import codecs
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


def make_folder(argument: str, path: Path) -> None:
    """Makes the folder ``path`` and the folders above it, where they are missing.

    Raises:
        FileExistsError: a file is in the way; the message names ``argument``.
    """
    check_not_a_file(argument, path)
    path.mkdir(parents=True, exist_ok=True)


def check_not_a_file(argument: str, path: Path) -> None:
    """Checks that ``path`` can be a folder.

    Raises:
        FileExistsError: it is a file, or lies in one; the message names ``argument``.
    """
    existing = next((place for place in (path, *path.parents) if place.exists()), None)
    if existing is not None and not existing.is_dir():
        raise FileExistsError(f"{argument}: {existing} is a file, expected a folder")


def decode_text(data: bytes, place: object) -> str:
    """UTF-8 text, without the byte-order mark that some editors put before it.

    Raises:
        ValueError: it is UTF-16, as PowerShell writes it, or no text; the message names ``place``.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{place}: UTF-16 text, expected UTF-8; save it again in that encoding")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if "\0" in text:
        raise ValueError(f"{place}: holds zero bytes, as UTF-16 text does, expected UTF-8 text")
    return text


def read_text(path: Path, limit: int | None = None) -> str:
    """The contents of a UTF-8 file, with or without a byte-order mark; each line break is one newline character.

    Args:
        path: the file.
        limit: most bytes that it may have.

    Raises:
        ValueError: it is UTF-16, no text, or longer than ``limit``.
    """
    with path.open("rb") as file:
        data = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise ValueError(f"{path}: got more than {limit} bytes, expected at most {limit}")
    return decode_text(data, path).replace("\r\n", "\n").replace("\r", "\n")


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
    text = read_text(path)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    except RecursionError:
        raise ValueError(f"{path}: not JSON (nested too deeply)") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}, expected a JSON object")
    return values


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process or call uses."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: folder {path.parent} does not exist, cannot write {path.name}")
    return path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
