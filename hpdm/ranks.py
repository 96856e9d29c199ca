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
def joined(device: torch.device) -> Iterator[torch.device]:
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


def from_first(value: T) -> T:
    """What the first process has, everywhere."""
    if world()[1] == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if not _alone.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the first process, which speaks for all."""
    return world()[0] == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process is the only one: what it calls shares nothing and waits for nobody."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def own(items: Sequence[T]) -> Sequence[T]:
    """The items that this process takes where all take turns."""
    rank, count = world()
    return items[rank::count]


def merged(mine: Mapping[int, T]) -> list[T]:
    """What all processes made of the items they took, by the items' numbers, in the order of the numbers."""
    found = {number: value for part in _from_all(dict(mine)) for number, value in part.items()}
    return [found[number] for number in sorted(found)]


def agree(name: str, value: object) -> None:
    """Checks that all processes were given the same.

    Raises:
        ValueError: they were not; raised in every process.
    """
    texts = _from_all(repr(value))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(f"{name}: process {rank} got {text}, expected {texts[0]} as in process 0")


@contextmanager
def together() -> Iterator[None]:
    """What fails in one process fails in all, so that none waits for another that is gone.

    Raises:
        RuntimeError: the others' failure, where this process had none of its own.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    for rank, text in enumerate(_from_all(None if failure is None else f"{failure}")):
        if text is not None and failure is None:
            failure = RuntimeError(f"process {rank}: {text}")
    if failure is not None:
        raise failure


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    return any(_from_all(flag))


def mean(t: Tensor) -> Tensor:
    """The mean of every process's ``t``."""
    count = world()[1]
    if count > 1:
        t = t.clone()
        dist.all_reduce(t)
        t /= count
    return t


def _from_all(value: T) -> list[T]:
    """What each process has, in their order."""
    count = world()[1]
    if count == 1:
        return [value]
    held: list[Any] = [None] * count
    dist.all_gather_object(held, value)
    return held
