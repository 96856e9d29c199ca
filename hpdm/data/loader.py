"""Batches from a DataLoader whose worker processes are replaced when one of them dies.

Videos are decoded outside of the DataLoader's workers (:mod:`hpdm.data.decode`), so a damaged video never ends a
worker. The operating system may end one, usually for lack of memory. PyTorch then raises an error at any point of the
main process, perhaps in the middle of an optimizer's step. A batch depends on its keys alone, so it can be read again,
and a long run continues with the same loss curve.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from hpdm.data.order import ClipKey

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Keys = list[ClipKey]

# What PyTorch says when a worker died. The second pattern: the pin-memory thread fails on a batch that the worker held.
_WORKER_DIED = re.compile(
    r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal)"
    r"|Caught (Connection\w*|BrokenPipe|EOF|FileNotFound)Error in pin memory thread"
)
_WORKER_RAISED = re.compile(r"Caught \w+ in DataLoader worker process")
_MAX_DEATHS = 3  # in a row, over the same batch


def load(make: Callable[[Iterable[Keys]], DataLoader[Batch]], keys: Iterable[Keys]) -> Generator[Batch, None, None]:
    """Yields the batches of ``keys`` in order, and reads a batch again when the workers that had it die.

    A death is noticed when that worker's batch is due, within the five seconds of PyTorch's own check. All workers are
    then replaced, and their parts of the cache are lost. PyTorch's handler of ``SIGCHLD``, which raises at any point of
    the main process, is switched off.

    Args:
        make: builds the loader, given its ``batch_sampler``.
        keys: the keys of each batch.

    Raises:
        RuntimeError: the workers died three times in a row over one batch.
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
            if not _WORKER_DIED.match(str(error)):
                raise _original(error) from None
            death = str(error).splitlines()[0].rstrip(".")
        else:
            deaths = 0
            pending.popleft()
            yield batch
            continue
        deaths += 1
        reason = f"{death}; lack of memory is the usual cause: fewer workers or a smaller cache need less"
        if deaths == _MAX_DEATHS:
            raise RuntimeError(f"the processes that read clips died {deaths} times over one batch: {reason}")
        log.warning("the processes that read clips are started again: %s", reason)
        del batches  # ends the workers that are left, before their replacements start
        batches = _start(make(requests()))


def _original(error: Exception) -> Exception:
    """The error that a worker raised; PyTorch raises one whose message is that worker's whole traceback."""
    if not _WORKER_RAISED.match(str(error)):
        return error
    return type(error)(str(error).rstrip().splitlines()[-1].partition(": ")[2])


def _start(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Starts the loader's workers, without the ``SIGCHLD`` handler that PyTorch installs for them."""
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        from_torch = getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if from_torch or handler is None else handler)
    return batches
