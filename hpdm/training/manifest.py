"""The manifest of a checkpoint: the names, sizes and hashes of its files, as their writers report them.

A manifest maps the name of a file in the checkpoint, ``"model/shard-00001-model-00001-of-00001.safetensors"``, to its
size in bytes and its SHA-256. Checkpoints of earlier versions have no hashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from hpdm.integrity import DamagedError, check_names, hash_of_file
from hpdm.json_file import Range


@dataclass(frozen=True)
class Written:
    """What is known of a file."""

    bytes: Annotated[int, Range(0, 2**62)]
    sha256: Annotated[str, Range(64, 64)] | None


Manifest = dict[str, Written]
Stored = Annotated[dict[Annotated[str, Range(1, 255)], Written | Annotated[int, Range(0, 2**62)]], Range(1, 10**6)]
"""A manifest in a JSON file, where earlier versions have the sizes alone."""


def of_files(folder: Path, files: Iterable[Path]) -> Manifest:
    """The manifest of files that were just written, somewhere in ``folder``."""
    return {
        path.relative_to(folder).as_posix(): Written(path.stat().st_size, hash_of_file(path)) for path in sorted(files)
    }


def to_json(files: Manifest) -> dict[str, Any]:
    """A manifest for a JSON file."""
    return {name: asdict(about) for name, about in files.items()}


def parse(stored: Mapping[str, Written | int]) -> Manifest:
    """A manifest from a JSON file that has the type :data:`Stored`."""
    return {name: Written(about, None) if isinstance(about, int) else about for name, about in stored.items()}


def check_sizes(folder: Path, files: Manifest) -> None:
    """Checks that a checkpoint has these files, with these sizes, and no others.

    Raises:
        DamagedError: a file has another size, or was not written with the checkpoint.
        FileNotFoundError: a file is missing.
    """
    for name, about in files.items():
        path = folder / name
        if name.startswith("/") or ".." in name.split("/"):
            raise DamagedError(f"{folder}: files: got {name!r}, expected names inside of the checkpoint")
        if not path.is_file():
            raise FileNotFoundError(f"checkpoint: {path} is missing")
        if path.stat().st_size != about.bytes:
            raise DamagedError(f"{path}: damaged (got {path.stat().st_size} bytes, expected {about.bytes})")
    check_names((path.relative_to(folder).as_posix() for path in folder.glob("*/*")), files, folder)


def check_hashes(folder: Path, files: Manifest) -> None:
    """Checks the contents of a checkpoint's files, as far as their hashes are known.

    Raises:
        DamagedError: a file has other contents.
        FileNotFoundError: a file is missing.
    """
    for name, about in files.items():
        if about.sha256 is not None and hash_of_file(folder / name) != about.sha256:
            raise DamagedError(f"{folder / name}: damaged (its contents and their hash do not match)")
