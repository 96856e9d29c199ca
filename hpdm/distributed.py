"""The processes of ``torch.distributed``: who is there, what all must agree on, what fails in all if it fails in one.

Without a process group there is one process, and nothing here waits for anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_alone = ContextVar("alone", default=False)


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Within it, the processes that ``torchrun`` started, if it did, know each other; gives this process's device.

    NCCL between GPUs, one per process, else gloo. Processes that know each other already stay so.
    """
    start = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if start:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if start:
            dist.destroy_process_group()


def broadcast(value: T) -> T:
    """What the first process has, everywhere."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _grouped() -> bool:
    return not _alone.get() and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _grouped() else 1


def is_first() -> bool:
    """Whether this is the first process, which speaks for all."""
    return rank() == 0


@contextmanager
def single_process() -> Iterator[None]:
    """Within it this process is the only one: what it calls shares nothing and waits for nobody."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def shard(items: Sequence[T]) -> Sequence[T]:
    """The items that this process takes where all take turns."""
    return items[rank() :: world_size()]


def gather(mine: Mapping[int, T]) -> list[T]:
    """What all processes made of the items they took, by the items' numbers, in the order of the numbers."""
    found = {number: value for part in _all_gather(dict(mine)) for number, value in part.items()}
    return [found[number] for number in sorted(found)]


def assert_same_on_all_ranks(name: str, value: object) -> None:
    """Checks that all processes were given the same.

    Raises:
        ValueError: they were not; raised in every process.
    """
    texts = _all_gather(repr(value))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(f"{name}: process {rank} got {text}, expected {texts[0]} as in process 0")


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """What fails in one process fails in all, so that none waits for another that is gone.

    Raises:
        RuntimeError: the others' failure, where this process had none of its own.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    for rank, text in enumerate(_all_gather(None if failure is None else f"{failure}")):
        if text is not None and failure is None:
            failure = RuntimeError(f"process {rank}: {text}")
    if failure is not None:
        raise failure


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return any(_all_gather(flag))


def mean(t: Tensor) -> Tensor:
    """The mean of every process's ``t``."""
    count = world_size()
    if count > 1:
        t = t.clone()
        dist.all_reduce(t)
        t /= count
    return t


def _all_gather(value: T) -> list[T]:
    """What each process has, in their order."""
    count = world_size()
    if count == 1:
        return [value]
    held: list[Any] = [None] * count
    dist.all_gather_object(held, value)
    return held


def pick_device(name: str) -> torch.device:
    """``"auto"`` is CUDA when there is one, else the CPU.

    Raises:
        RuntimeError: CUDA asked for and not there, or no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: got {name!r}, but PyTorch sees no CUDA device")
    return device
