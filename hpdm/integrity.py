"""Hashes by which a reader notices that a file is not what its writer wrote: flipped bits, swapped or missing parts.

They are SHA-256, but no signature: they tell damage, not forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEAL = "sha256"
"""The entry of a sealed JSON object that holds the hash of all others."""


class DamagedError(ValueError):
    """A file is not as it was written."""


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of_tensor(t: Tensor) -> str:
    """SHA-256 of a CPU tensor's dtype, shape and values."""
    digest = hashlib.sha256(f"{t.dtype} {tuple(t.shape)} ".encode())
    digest.update(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_of_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys and its white space."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its hash as one more entry, for :func:`check_seal`."""
    return {**values, SEAL: hash_of_json(values)}


def check_seal(values: Mapping[str, Any], place: object) -> None:
    """Checks that an object, read from ``place``, is as :func:`sealed` made it.

    Raises:
        DamagedError: it has changed, or has no hash.
    """
    if values.get(SEAL) != hash_of_json({name: value for name, value in values.items() if name != SEAL}):
        raise DamagedError(f"{place}: damaged (its contents and their hash do not match)")


def check_hashes(tensors: Mapping[str, Tensor], hashes: Mapping[str, str], place: object) -> None:
    """Checks that tensors, read from ``place``, are those that were hashed.

    Raises:
        DamagedError: others, or tensors of other names.
    """
    check_names(tensors, hashes, place)
    for name, t in tensors.items():
        if hash_of_tensor(t) != hashes[name]:
            raise DamagedError(f"{place}: damaged ({name} and its hash do not match)")


def check_names(found: Iterable[str], expected: Iterable[str], place: object) -> None:
    """Checks that the parts found at ``place`` are those that were written.

    Raises:
        DamagedError: some are missing, or there are others.
    """
    there, written = set(found), set(expected)
    missing, extra = sorted(written - there), sorted(there - written)
    if missing:
        raise DamagedError(f"{place}: damaged ({missing[0]} is missing)")
    if extra:
        raise DamagedError(f"{place}: damaged ({extra[0]} was not written with it)")
