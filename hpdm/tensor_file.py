"""Tensors in safetensors files: how they are written, and how files that may be damaged or a stranger's are read."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hpdm.files import decode_text
from hpdm.integrity import DamagedError, check_names, check_seal, hash_of_json, hash_of_tensor, sealed
from hpdm.json_file import Range, checked, parse_json

FilePrecision = Literal["fp32", "fp16"]
DTYPES: dict[FilePrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}

MAX_HEADER_BYTES = 16 * 2**20
"""Largest header of a file that is read: names, shapes and texts, without the numbers."""
_LENGTH = struct.Struct("<Q")
_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_HASHES = "hashes"


class _Hashes(TypedDict):
    tensors: dict[str, Annotated[str, Range(64, 64)]]
    texts: Annotated[str, Range(64, 64)]


_Header = TypedDict("_Header", {"__metadata__": dict[str, Annotated[str, Range(0, MAX_HEADER_BYTES)]]}, total=False)

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors, by name."""


class TensorFile:
    """A safetensors file that may be damaged or a stranger's; its tensors are read one by one. A context manager.

    Args:
        path: the file.

    Attributes:
        metadata: the texts of the header.
        shapes: shape and dtype of every tensor.
        hashes: of every tensor, where the file has them (``write_tensors(..., hashed=True)``); else ``None``. Every
            tensor that is read is then compared with its own.

    Raises:
        OSError: it cannot be read.
        ValueError: damaged, a header of more than 16 MB, or tensors of a dtype that PyTorch does not have; the message
            names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = self._header().get("__metadata__", {})
        self.hashes = self._own_hashes()
        # safetensors checks that the tensors fill the file and do not overlap.
        with self._naming_the_file():
            self._file = safe_open(path, "pt").__enter__()
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
        self.shapes: Shapes = {
            name: (tuple(part.get_shape()), self._dtype(name, part.get_dtype())) for name, part in slices.items()
        }
        if self.hashes is not None:
            check_names(self.shapes, self.hashes, path)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def read(self, name: str) -> Tensor:
        """A tensor of the file, on the CPU.

        Raises:
            DamagedError: it is not the one that was written, by its hash.
        """
        with self._naming_the_file():
            tensor: Tensor = self._file.get_tensor(name)
        if self.hashes is not None and hash_of_tensor(tensor) != self.hashes[name]:
            raise DamagedError(f"{self.path}: damaged ({name} and its hash do not match)")
        return tensor

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """The rows ``first`` to ``last - 1`` of a tensor of the file, on the CPU; the others are not read."""
        with self._naming_the_file():
            tensor: Tensor = self._file.get_slice(name)[first:last]
        return tensor

    def check(self, expected: Shapes) -> None:
        """Checks that the file holds exactly these tensors, in their dtype or one that weights may be stored in.

        Raises:
            ValueError: a tensor is missing, of another shape or dtype, or too many.
        """
        missing, extra = sorted(set(expected) - set(self.shapes)), sorted(set(self.shapes) - set(expected))
        if missing or extra:
            raise ValueError(f"{self.path}: of another config: lacks {missing[:3]}, has {extra[:3]} more")
        for name, (shape, dtype) in expected.items():
            stored_shape, stored_dtype = self.shapes[name]
            if stored_shape != shape:
                raise ValueError(f"{self.path}: {name}: got shape {stored_shape}, expected {shape} as in its config")
            if stored_dtype not in (dtype, *DTYPES.values()):
                raise ValueError(f"{self.path}: {name}: got {stored_dtype}, expected {dtype}")

    def _header(self) -> Any:
        with self.path.open("rb") as file:
            start = file.read(_LENGTH.size)
            length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else 0
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError(f"{self.path}: damaged (header of {length} bytes, expected 2 to {MAX_HEADER_BYTES})")
            text = file.read(length)
        return parse_json(decode_text(text, self.path), _Header, self.path)

    def _own_hashes(self) -> Mapping[str, str] | None:
        if _HASHES not in self.metadata:
            return None
        values = parse_json(self.metadata[_HASHES], dict[str, Any], self.path)
        check_seal(values, self.path)
        stored: _Hashes = checked(values, _Hashes, self.path)
        if stored["texts"] != _hash_of_texts(self.metadata):
            raise DamagedError(f"{self.path}: damaged (the header and its hash do not match)")
        return stored["tensors"]

    def _dtype(self, name: str, stored: str) -> torch.dtype:
        if stored not in _NAMES:
            raise ValueError(f"{self.path}: {name}: got numbers of type {stored}, expected one of {', '.join(_NAMES)}")
        return _NAMES[stored]

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise DamagedError(f"{self.path}: damaged ({error})") from None


def _hash_of_texts(metadata: Mapping[str, str]) -> str:
    return hash_of_json({name: text for name, text in metadata.items() if name != _HASHES})


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], hashed: bool = False) -> None:
    """Writes a safetensors file, flushed to the disk. It is streamed, so that other threads go on meanwhile.

    Args:
        path: the file. It is not written atomically: give it a temporary name.
        tensors: by name, on the CPU.
        metadata: texts of the header.
        hashed: also write hashes of tensors and texts, for files that lie alone.

    Raises:
        OSError: the file cannot be written, e.g. as the disk is full.
    """
    if hashed:
        hashes = {
            "tensors": {name: hash_of_tensor(t) for name, t in tensors.items()},
            "texts": _hash_of_texts(metadata),
        }
        metadata = {**metadata, _HASHES: json.dumps(sealed(hashes))}
    with path.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # what the user's umask gives a new file
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, dict(metadata))
    except SafetensorError as error:  # what safetensors makes of an OSError
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode & 0o777)  # safetensors makes it unreadable for others
    with path.open("rb") as file:
        os.fsync(file.fileno())
