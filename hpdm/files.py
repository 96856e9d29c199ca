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

MAX_TEXT_FILE_BYTES = 16 * 2**20
"""Longest text file that is read where nothing else is said."""
MAX_LINE_BYTES = 2**20
"""Longest line of a text file of any length that is read line by line."""


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


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a file that is not longer than ``limit`` bytes; no more than that is ever read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is longer.
    """
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{path}: got more than {limit} bytes, expected at most {limit}")
    return data


def read_text(path: Path, limit: int = MAX_TEXT_FILE_BYTES) -> str:
    """The contents of a UTF-8 file, with or without a byte-order mark; each line break is one newline character.

    Args:
        path: the file.
        limit: most bytes that it may have.

    Raises:
        ValueError: it is UTF-16, no text, or longer than ``limit``.
    """
    return decode_text(read_bytes(path, limit), path).replace("\r\n", "\n").replace("\r", "\n")


def numbered_lines(path: Path, limit: int = MAX_LINE_BYTES) -> Iterator[tuple[str, str]]:
    """The lines of a UTF-8 file that are not blank, each with ``path:line number`` for messages, read one by one.

    Args:
        path: the file.
        limit: most bytes of a line.

    Raises:
        ValueError: the file is no UTF-8 text, or a line is longer than ``limit``.
    """
    with path.open("rb") as file:
        number = 0
        while data := file.readline(limit + 1):
            place = f"{path}:{number + 1}"
            if len(data) > limit:
                raise ValueError(f"{place}: got a line of more than {limit} bytes, expected at most {limit}")
            for line in decode_text(data, place).removesuffix("\n").removesuffix("\r").split("\r"):
                number += 1
                if line.strip():
                    yield f"{path}:{number}", line


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


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process or call uses."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: folder {path.parent} does not exist, cannot write {path.name}")
    return path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
