"""Writing files and folders atomically: under its final name, a file is always complete. And reading text of any size.

What is written lies first in a temporary folder beside its place, ``.NAME.0123456789abcdef.tmp``, and is then flushed
to the disk and renamed. Nobody can guess that name, and nobody else can write into that folder, so no link that
somebody planted is followed, and what libraries leave beside a file they write is in there too. The dot makes readers
skip it.

While it is in use, the folder holds a locked file. A killed process loses its locks but leaves its folder: the next
process that writes there deletes those whose lock it gets.
"""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MAX_TEXT_FILE_BYTES = 16 * 2**20
"""Longest text file that is read where nothing else is said."""
MAX_LINE_BYTES = 2**20
"""Longest line of a text file of any length that is read line by line."""


_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp", re.DOTALL)
_LOCK = ".lock"
_START_S = 60.0  # seconds from the making of a temporary folder to that of its lock, at most
_cleaned: set[Path] = set()  # folders in which this process has looked for what killed ones left


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary path for a file; renames it to ``path`` on success, deletes it on failure.

    The temporary file has the name of ``path``, from whose suffix many writers choose the format.

    Args:
        path: the file; an existing one is replaced.
        flush: bring the contents to the disk before the renaming, so that a power cut cannot lose them.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the file cannot be written, e.g. as the disk is full.
    """
    path = Path(path)
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        if flush:
            _flush(temporary)
        os.replace(temporary, path)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new temporary folder; renames it to ``path`` on success, deletes it with its contents on failure.

    Raises:
        FileNotFoundError: the folder that is to hold ``path`` does not exist.
        OSError: a file cannot be written, e.g. as the disk is full; on success, ``path`` is a file or a folder that is
            not empty.
    """
    path = Path(path).absolute()
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        temporary.mkdir()
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            _flush(file)
        os.replace(temporary, path)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` that no other process or user writes into; errors of writing there name ``path``."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: folder {path.parent} does not exist, cannot write {path.name}")
    delete_leftovers(path.parent)
    folder, lock = path, -1
    try:
        while lock < 0:
            folder = path.with_name(f".{path.stem[:40]}.{secrets.token_hex(8)}.tmp")
            folder.mkdir(mode=0o700)
            lock = _new_lock(folder / _LOCK)
        yield folder
    except OSError as error:
        inside = error.filename is None or str(error.filename).startswith(str(folder))
        if not inside:
            raise
        if error.errno is None:
            raise OSError(str(error).replace(str(folder), str(path.parent))) from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if folder != path:
            shutil.rmtree(folder, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _new_lock(path: Path) -> int:
    """The descriptor of a new file that this process has locked; -1 if another one took it for a leftover."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # On a file system without locks nobody gets the lock, and nothing is taken for a leftover.
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(lock)
            return -1
    return lock


def delete_leftovers(folder: Path) -> None:
    """Deletes the temporary folders of killed processes, once per process and folder."""
    folder = folder.absolute()
    if folder in _cleaned:
        return
    _cleaned.add(folder)
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                _delete_leftover(Path(entry.path))


def _delete_leftover(folder: Path) -> None:
    """Deletes a temporary folder unless a living process uses it, which has its lock."""
    with suppress(OSError):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            if time.time() - folder.stat().st_mtime > _START_S:
                shutil.rmtree(folder)
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


def _flush(path: Path) -> None:
    """Brings a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Writes ``value`` to ``path`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2))
