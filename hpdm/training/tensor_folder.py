"""The tensors of a part of a checkpoint, in a folder of safetensors files with the layout of PyTorch's own checkpoints.

Sharded tensors have a file per rank: each rank saves its shards, and of a shard that several ranks hold one of them,
in turns. Whole tensors, which every rank has, are in the file of rank 0. Any number of ranks can read either, including
a single process without a process group.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from hpdm import distributed
from hpdm.integrity import DamagedError
from hpdm.tensor_file import write_tensors
from hpdm.training import manifest
from hpdm.training.manifest import Manifest

_FILE = "shard-{:05d}-model-00001-of-00001.safetensors"
"""The name that ``torch.distributed.checkpoint`` gives to the file of a rank, counted from 1."""


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether each rank holds only its shards of the tensors."""
    return any(isinstance(t, DTensor) for t in tensors)


class Piece(NamedTuple):
    """What one rank saves of a tensor: its shard, or all of it."""

    tensor: Tensor
    offset: tuple[int, ...]
    """Where it begins in the whole tensor, along each axis."""


@torch.no_grad()
def pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """What this rank saves of tensors, which are not copied. Together the ranks save each number once."""
    own: dict[str, Piece] = {}
    saved: dict[int, list[int]] = {}  # by number of replicas: how many numbers each of them saves
    for name, t in tensors.items():
        if not isinstance(t, DTensor):
            if distributed.is_first():
                own[name] = Piece(t, (0,) * t.ndim)
            continue
        replicas, replica = _replica(t)
        counts = saved.setdefault(replicas, [0] * replicas)
        turn = counts.index(min(counts))
        counts[turn] += t.numel()
        local = t.to_local()
        if replica == turn and local.numel():
            own[name] = Piece(local, _offset(t))
    return own


def _replica(t: DTensor) -> tuple[int, int]:
    """The number of ranks that hold the shard that this rank holds of a tensor, and which of them it is."""
    replicas, replica = 1, 0
    for axis, placement in enumerate(t.placements):
        if placement.is_replicate():
            replicas *= t.device_mesh.size(axis)
            replica = replica * t.device_mesh.size(axis) + t.device_mesh.get_local_rank(axis)
    return replicas, replica


def _offset(t: DTensor) -> tuple[int, ...]:
    """Where this rank's shard, which is not empty, begins."""
    (chunk,) = t.__create_chunk_list__()  # the protocol of torch.distributed.checkpoint
    return tuple(chunk.offsets)


def save(own: Mapping[str, Piece], checkpoint: Path, part: str) -> Manifest:
    """Writes this rank's pieces as safetensors into the folder ``part``, as ``torch.distributed.checkpoint`` does.

    Unlike it, this communicates with no other rank, so that it can run beside training, and streams the tensors to the
    file instead of copying them into one string of bytes, which would need the memory twice and keep other threads
    waiting.

    Returns:
        What is written, by its name in the checkpoint: nothing where this rank has no pieces, unless it is rank 0.

    Raises:
        OSError: it cannot be written.
    """
    if not own and not distributed.is_first():
        return {}
    offsets = {name: {"saved_offsets": list(piece.offset)} for name, piece in own.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    path = checkpoint / part
    file = path / _FILE.format(distributed.rank() + 1)
    try:
        path.mkdir(exist_ok=True)
        write_tensors(file, {name: piece.tensor for name, piece in own.items()}, metadata)
    except OSError as error:
        raise OSError(f"checkpoint: {path} cannot be written ({error})") from error
    return manifest.of_files(checkpoint, [file])


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


def load(targets: Mapping[str, Tensor], path: Path, may_lack: tuple[str, ...] = ()) -> None:
    """Fills the targets in place. Of sharded targets this rank reads only its shards.

    Args:
        targets: by name.
        path: the folder.
        may_lack: how names begin that the folder may lack; these targets stay as they are.

    Raises:
        DamagedError: the folder is damaged, or holds numbers that are not finite.
        FileNotFoundError: it has been deleted meanwhile.
        ValueError: it has other tensors.
    """
    lacking = [name for name in targets if name.startswith(may_lack)] if may_lack else []
    if lacking:
        found = stored(path)
        targets = {name: target for name, target in targets.items() if name in found or name not in lacking}
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
