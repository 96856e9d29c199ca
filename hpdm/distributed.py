"""The ranks (processes) of a run: rank and world size, collectives, and errors that are raised on all ranks.

Without a process group there is one rank, 0 of 1, and no function here communicates. With one, each function
below that communicates is a collective: every rank must call it, in the same order.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hpdm.watchdog import Watchdog

T = TypeVar("T")

_single_process = ContextVar("single_process", default=False)
_group: ContextVar[dist.ProcessGroup | None] = ContextVar("group", default=None)
"""Of the collectives below; ``None`` for the group of the main thread."""
_NAMED = 5  # in messages about ranks that differ


TIMEOUT = 300.0
"""Seconds after which a process that does not come, or does not answer, is given up."""
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""For a collective of processes that all answer: one of them may do long work alone meanwhile."""
_ENDING = 5.0
"""Seconds for closing the connections between the processes."""

_watchdog: Watchdog | None = None


@contextmanager
def process_group(device: torch.device, timeout: float = TIMEOUT) -> Iterator[torch.device]:
    """Within the block the processes that ``torchrun`` started, if any, form a process group.

    The backend is NCCL between GPUs, one GPU per process, and gloo between CPUs. A group that exists already is used
    and left as it is. A process that dies or no longer answers ends all of them, see :mod:`hpdm.watchdog`.

    Args:
        device: where to work.
        timeout: seconds after which a process is given up that does not come or does not answer.

    Yields:
        This process's device: ``device``, or its own GPU where NCCL was started.

    Raises:
        RuntimeError: a process did not come, or has died; the message names it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    watchdog = _start_group("nccl" if device.type == "cuda" else "gloo", timeout)
    try:
        yield device
        # Together: a process that ended earlier than others would look like one that has died.
        dist.barrier()
    except BaseException as error:
        # What a collective raises as its peer is gone: a RuntimeError, of no narrower type with gloo.
        from_peer = type(error) is RuntimeError or isinstance(error, dist.DistError)
        reason = watchdog.wait_for_reason() if from_peer else None
        watchdog.leave(failed=True)
        _close_group(device)
        if reason is not None:
            raise RuntimeError(reason) from error
        raise
    watchdog.leave(failed=False)
    _close_group(device)


def _start_group(backend: str, timeout: float) -> Watchdog:
    """Starts the group of all processes and watches it."""
    global _watchdog
    limit = timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=rank, world_size=world_size,
            timeout=max(limit, _COLLECTIVE_TIMEOUT),
        )  # fmt: skip
        own = dist.PrefixStore("watchdog", store.clone())
        own.set_timeout(limit)
        _watchdog = Watchdog(own, rank, world_size, timeout)
        _watchdog.start()
    except dist.DistStoreError as error:
        raise RuntimeError(
            f"processes: not all {os.environ['WORLD_SIZE']} have come within {timeout:.0f} s "
            f"({str(error).splitlines()[0]})"
        ) from None
    return _watchdog


def _close_group(device: torch.device) -> None:
    """Destroys the group; gives up after some seconds, since it waits for what other processes may never send."""
    global _watchdog
    _watchdog = None

    def close() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread
        dist.destroy_process_group()

    closing = threading.Thread(target=close, name="hpdm-closing", daemon=True)
    closing.start()
    closing.join(_ENDING)


def at(step: int, part: int, what: str) -> None:
    """Tells the watchdog of a process group, if there is one, what this process does; see :meth:`Watchdog.at`."""
    if _watchdog is not None:
        _watchdog.at(step, part, what)


def rank() -> int:
    """The number of this process, 0 without a process group."""
    return dist.get_rank() if _in_group() else 0


def world_size() -> int:
    """The number of processes, 1 without a process group."""
    return dist.get_world_size() if _in_group() else 1


def is_first() -> bool:
    """Whether this is rank 0, which writes files and messages for all."""
    return rank() == 0


@contextmanager
def single_process() -> Iterator[None]:
    """Within the block this process acts as the only one: rank 0 of 1, without communication."""
    token = _single_process.set(True)
    try:
        yield
    finally:
        _single_process.reset(token)


def further_group() -> dist.ProcessGroup:
    """A group of all ranks over the CPU, for the collectives of a thread beside the main one. A collective.

    Collectives of two threads in one group would meet in another order on each rank. :func:`communicating_over` makes a
    thread use it.
    """
    return dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)


@contextmanager
def communicating_over(group: dist.ProcessGroup) -> Iterator[None]:
    """Within the block the collectives of this module use ``group``, on this thread alone."""
    token = _group.set(group)
    try:
        yield
    finally:
        _group.reset(token)


def _in_group() -> bool:
    return not _single_process.get() and dist.is_available() and dist.is_initialized()


def shard(items: Sequence[T]) -> Sequence[T]:
    """This rank's share: every ``world_size()``-th item, starting with number ``rank()``. Nothing is communicated."""
    return items[rank() :: world_size()]


def all_gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank."""
    size = world_size()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=_group.get())
    return values


def gather(results: Mapping[int, T]) -> list[T]:
    """All ranks' results, sorted by their keys, on every rank.

    Args:
        results: what this rank computed, by the number of the item; every item belongs to one rank.
    """
    merged = {number: result for part in all_gather(dict(results)) for number, result in part.items()}
    return [merged[number] for number in sorted(merged)]


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_group.get())
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank."""
    return any(all_gather(flag))


def maximum(t: Tensor) -> Tensor:
    """The elementwise maximum of ``t`` over all ranks, with the same shape and dtype on each; ``t`` is not changed."""
    if world_size() > 1:
        t = t.clone()
        dist.all_reduce(t, dist.ReduceOp.MAX, group=_group.get())
    return t


def mean(t: Tensor) -> Tensor:
    """The elementwise mean of ``t`` over all ranks, with the same shape and dtype on each; ``t`` is not changed."""
    size = world_size()
    if size > 1:
        t = t.clone()
        dist.all_reduce(t, group=_group.get())
        t /= size
    return t


def assert_same_on_all_ranks(name: str, value: object) -> None:
    """Checks that every rank has the same value, by its ``repr``.

    Raises:
        ValueError: the ranks differ; raised on every rank. Of mappings it names the entries that differ, the first
            few, and which ranks have what.
    """
    entries = dict(_entries(name, value))
    digest = hashlib.sha256(repr(sorted(entries.items())).encode()).hexdigest()
    if len(set(gather({rank(): digest}))) == 1:
        return
    ranks = gather({rank(): entries})
    names = list(dict.fromkeys(entry for other in ranks for entry in other))
    differing = [entry for entry in names if any(other.get(entry) != ranks[0].get(entry) for other in ranks)]
    messages = [_difference(entry, [other.get(entry, "none") for other in ranks]) for entry in differing[:_NAMED]]
    more = f"; {len(differing) - _NAMED} more differ" if len(differing) > _NAMED else ""
    raise ValueError("; ".join(messages) + more)


def _entries(name: str, value: object) -> Iterator[tuple[str, str]]:
    """The ``repr`` of a value, or of each value inside of a mapping, with its name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _entries(f"{name}: {key}", inner)
    else:
        yield name, repr(value)


def _difference(name: str, texts: Sequence[str]) -> str:
    """Which ranks have another text than rank 0."""
    ranks: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        ranks.setdefault(text, []).append(number)
    got = ", ".join(
        f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_NAMED]))}"
        f"{', ...' if len(numbers) > _NAMED else ''} got {_short(text)}"
        for text, numbers in list(ranks.items())[1 : 1 + _NAMED]
    )
    return f"{name}: {got}, expected {_short(texts[0])} as in process 0"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


class OtherRankError(RuntimeError):
    """Another rank has raised an error."""


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raises on every rank if the block raised on any, so that no rank waits in its next collective for a failed one.

    Raises:
        Exception: what the block raised on this rank.
        OtherRankError: the block raised on another rank only; the message names the rank and its error.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    for other, text in enumerate(all_gather(None if failure is None else f"{failure}")):
        if text is not None and failure is None:
            failure = OtherRankError(f"process {other}: {text}")
    if failure is not None:
        raise failure


def pick_device(name: str) -> torch.device:
    """The device of that name; ``"auto"`` is CUDA where PyTorch sees a CUDA device, else the CPU.

    Raises:
        RuntimeError: a CUDA device is asked for and PyTorch sees none, or the name is no device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device: got {name!r}, but PyTorch sees no CUDA device")
    return device
