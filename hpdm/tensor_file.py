"""Writing tensors as a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

FilePrecision = Literal["fp32", "fp16"]
DTYPES: dict[FilePrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, flushed to the disk. It is streamed, so that other threads go on meanwhile.

    Args:
        path: the file. It is not written atomically: give it a temporary name.
        tensors: by name, on the CPU.
        metadata: texts of the header.

    Raises:
        OSError: the file cannot be written, e.g. as the disk is full.
    """
    with path.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode  # what the user's umask gives a new file
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, dict(metadata))
    except SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(f"{path.parent}: {error}") from error
    path.chmod(mode & 0o777)  # safetensors makes it unreadable for others
    with path.open("rb") as file:
        os.fsync(file.fileno())
