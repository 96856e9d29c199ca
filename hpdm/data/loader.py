"""Batches from a DataLoader whose worker processes are replaced when one of them dies.

Videos are decoded outside of the DataLoader's workers (:mod:`hpdm.data.decode`), so a damaged video never ends a
worker. The operating system may end one, usually for lack of memory. What PyTorch then raises depends on what the
worker was doing: a message about it, or the error of a connection that broke. So a death is told from other errors by
the exit codes of the workers. A batch depends on its keys alone, so it can be read again, and a long run continues with
the same loss curve.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import TypeVar

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from hpdm.data.order import ClipKey

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Keys = list[ClipKey]

_WORKER_RAISED = re.compile(r"Caught \w+ in DataLoader worker process")
_MAX_DEATHS = 3  # in a row, over the same batch
_DEATH_S = 2.0  # for the exit code of a worker whose connections are closed already


def load(make: Callable[[Iterable[Keys]], DataLoader[Batch]], keys: Iterable[Keys]) -> Generator[Batch, None, None]:
    """Yields the batches of ``keys`` in order, and reads a batch again when a worker dies that had it.

    A death is noticed when that worker's batch is due, within the five seconds of PyTorch's own check. All workers are
    then replaced, and their parts of the cache are lost. PyTorch's handler of ``SIGCHLD``, which raises at any point of
    the main process, perhaps in the middle of an optimizer's step, is switched off.

    Args:
        make: builds the loader, given its ``batch_sampler``.
        keys: the keys of each batch.

    Raises:
        RuntimeError: workers died three times in a row over one batch.
        Exception: whatever reading a clip raises.
    """
    remaining = iter(keys)
    pending = deque[Keys]()  # requested from the loader and not delivered yet

    def requests() -> Iterator[Keys]:
        yield from tuple(pending)
        for batch_keys in remaining:
            pending.append(batch_keys)
            yield batch_keys

    batches, deaths = _start(make(requests())), 0
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            dead = _dead(batches)
            if not dead:
                raise _original(error) from None
            _forget_frames(error)
        else:
            deaths = 0
            pending.popleft()
            yield batch
            continue
        deaths += 1
        reason = f"{_describe(dead)}; lack of memory is the usual cause: fewer workers or a smaller cache need less"
        if deaths == _MAX_DEATHS:
            raise RuntimeError(f"the processes that read clips died {deaths} times over one batch: {reason}")
        log.warning("the processes that read clips are started again: %s", reason)
        del batches  # ends the workers that are left, before their replacements start
        batches = _start(make(requests()))


def _dead(batches: Iterator[object]) -> list[BaseProcess]:
    """The workers that have ended. One that was killed closes its connections a moment before it has an exit code."""
    workers: Sequence[BaseProcess] = getattr(batches, "_workers", ())  # there are none without worker processes
    ended = connection.wait([worker.sentinel for worker in workers], _DEATH_S) if workers else ()
    for worker in workers:
        if worker.sentinel in ended:
            worker.join(_DEATH_S)
    return [worker for worker in workers if worker.exitcode is not None]


def _describe(dead: Sequence[BaseProcess]) -> str:
    """Which workers died of what."""
    return ", ".join(f"process {worker.pid} {_cause(worker.exitcode)}" for worker in dead)


def _cause(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"ended with exit status {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


def _original(error: Exception) -> Exception:
    """The error that a worker raised; PyTorch raises one whose message is that worker's whole traceback."""
    if not _WORKER_RAISED.match(str(error)):
        return error
    _forget_frames(error)
    return type(error)(str(error).rstrip().splitlines()[-1].partition(": ")[2])


def _forget_frames(error: Exception) -> None:
    """Frees PyTorch's frames, which hold the workers: of an error that a worker raised, one of them holds the error."""
    error.__traceback__ = None


def _start(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Starts the loader's workers, without the ``SIGCHLD`` handler that PyTorch installs for them."""
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        _switch_handler_off()
    return iter(loader)


def _switch_handler_off() -> None:
    """Has PyTorch install its handler, which it does once per process, and takes it away, before any worker can die."""
    before = signal.getsignal(signal.SIGCHLD)
    signal_handling._set_SIGCHLD_handler()
    now = signal.getsignal(signal.SIGCHLD)
    if getattr(now, "__module__", "") == signal_handling.__name__:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if now is before or before is None else before)
