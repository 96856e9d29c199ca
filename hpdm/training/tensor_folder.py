"""The tensors of a part of a checkpoint, in a folder of safetensors files with the layout of PyTorch's own checkpoints.

Sharded tensors have a file per rank: each rank saves its shards. Whole tensors, which every rank has, are in one file,
which rank 0 writes. Any number of ranks can read either, including a single process without a process group.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from hpdm import distributed
from hpdm.integrity import DamagedError
from hpdm.tensor_file import write_tensors
from hpdm.training import manifest
from hpdm.training.manifest import Manifest

_WHOLE_FILE = "shard-00001-model-00001-of-00001.safetensors"
"""The name that ``torch.distributed.checkpoint`` gives to the file of a single rank."""
_SHARD = re.compile(r"shard-(\d{5})-")


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether each rank holds only its shards of the tensors."""
    return any(isinstance(t, DTensor) for t in tensors)


def save(tensors: Mapping[str, Tensor], checkpoint: Path, part: str) -> Manifest:
    """Writes tensors as safetensors into the folder ``part``: each rank its shards, or rank 0 alone. A collective.

    Returns:
        What this rank has written, by its name in the checkpoint.
    """
    path = checkpoint / part
    if is_sharded(tensors.values()):
        _save_shards(tensors, path)
    with distributed.raise_on_all_ranks():
        if distributed.is_first() and not is_sharded(tensors.values()):
            _save_whole(tensors, path)
        own = [file for file in path.iterdir() if _rank_of(file) == distributed.rank()] if path.is_dir() else []
        return manifest.of_files(checkpoint, own)


def _rank_of(file: Path) -> int:
    """The rank that wrote a file of a part; the files besides the shards are rank 0's."""
    shard = _SHARD.match(file.name)
    return int(shard[1]) - 1 if shard else 0


def _save_whole(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes whole tensors as ``torch.distributed.checkpoint`` does for a single rank.

    Unlike it, this streams the tensors to the file instead of copying them into one string of bytes, which would need
    the memory twice and keep other threads waiting.
    """
    offsets = {name: {"saved_offsets": [0] * t.ndim} for name, t in tensors.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    path.mkdir()
    try:
        write_tensors(path / _WHOLE_FILE, tensors, metadata)
    except OSError as error:
        raise OSError(f"checkpoint: {path} cannot be written ({error})") from error


def _save_shards(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes this rank's shards of the tensors. A collective."""
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(dict(tensors), storage_writer=writer, no_dist=distributed.world_size() == 1)
    except CheckpointException as error:
        failed = "; ".join(f"process {rank}: {reason}" for rank, (reason, _) in sorted(error.failures.items()))
        raise OSError(f"checkpoint: {path} cannot be written ({failed})") from error


class Stored(NamedTuple):
    """What a folder of safetensors files says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def stored(path: Path) -> dict[str, Stored]:
    """The tensors in a folder of safetensors files, by name."""
    try:
        metadata = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    except (SafetensorError, RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        _check_still_there(path)
        # PyTorch reads the JSON in the headers without checking it.
        raise DamagedError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    return {
        name: Stored(tuple(about.size), about.properties.dtype)
        for name, about in metadata.items()
        if isinstance(about, TensorStorageMetadata)
    }


def check(targets: Mapping[str, Tensor], path: Path) -> None:
    """Checks that a folder has tensors of the targets' names, shapes and dtypes; they may be on the meta device.

    Raises:
        DamagedError: the folder is damaged.
        FileNotFoundError: it has been deleted meanwhile.
        ValueError: it has other tensors.
    """
    found = stored(path)
    missing, extra = sorted(set(targets) - set(found)), sorted(set(found) - set(targets))
    if missing or extra:
        _check_still_there(path)
        raise ValueError(f"{path}: of another config: lacks {missing[:3]}, has {extra[:3]} more")
    for name, target in targets.items():
        if tuple(target.shape) != found[name].shape:
            raise ValueError(
                f"{path}: of another config: {name} has shape {found[name].shape}, not {tuple(target.shape)}"
            )
        if target.dtype != found[name].dtype:
            raise ValueError(
                f"{path}: of another config: {name} has numbers of {found[name].dtype}, not {target.dtype}"
            )


def load(targets: Mapping[str, Tensor], path: Path) -> None:
    """Fills the targets in place. Of sharded targets this rank reads only its shards.

    Raises:
        DamagedError: the folder is damaged, or holds numbers that are not finite.
        FileNotFoundError: it has been deleted meanwhile.
        ValueError: it has other tensors.
    """
    check(targets, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            # No collective: each rank reads what it needs by itself.
            dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
        except CheckpointException as error:
            _check_still_there(path)
            reason = next(iter(error.failures.values()))[0]
            raise DamagedError(f"{path}: damaged ({type(reason).__name__}: {reason})") from None
        except (RuntimeError, OSError):
            _check_still_there(path)
            raise
    broken = first_not_finite(targets)
    if broken is not None:
        raise DamagedError(f"{path}: damaged ({broken} holds numbers that are not finite)")


def _check_still_there(path: Path) -> None:
    """Raises FileNotFoundError if a folder has been deleted while it was read, as by a training that goes on."""
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint: {path} is missing")


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with an infinity or NaN in this rank's part of it; ``None`` if there is none."""
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    floats = {name: t for name, t in local.items() if t.is_floating_point()}
    if not floats:
        return None
    # All are asked before the first answer is read: one synchronization with the device.
    finite = torch.stack([t.isfinite().all().to(next(iter(floats.values())).device) for t in floats.values()])
    return next((name for name, good in zip(floats, finite.tolist()) if not good), None)
