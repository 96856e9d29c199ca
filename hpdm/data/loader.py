"""A DataLoader's batches, with worker processes started again when one of them dies.

Clips are decoded in processes of their own (:mod:`hpdm.data.decode`), so a bad clip never ends a DataLoader worker:
what does is the system, for lack of memory as a rule. PyTorch then raises an error wherever the main process happens to
be, perhaps between two weights of an optimizer's step. Since a batch is a pure function of its keys, reading it again
loses nothing, so a run of days goes on and its curve is the same.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from hpdm.data.clips import ClipKey

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
Keys = list[ClipKey]

# The second: a batch that lay with the dead worker, when the thread that pins memory asks for it.
_DEATH = re.compile(
    r"DataLoader worker \(pid.*(exited unexpectedly|killed by signal)"
    r"|Caught (Connection\w*|BrokenPipe|EOF|FileNotFound)Error in pin memory thread"
)
_CAUGHT = re.compile(r"Caught \w+ in DataLoader worker process")
_DEATHS = 3  # over one batch, before it is taken for more than bad luck


def load(make: Callable[[Iterable[Keys]], DataLoader[Batch]], keys: Iterable[Keys]) -> Iterator[Batch]:
    """The batches of ``keys`` in order, whatever becomes of the processes that read them.

    A death is noticed when the batch of that worker is due, within five seconds. With it all workers are replaced, and
    with them their shares of the cache. While this iterator lives, PyTorch's own handler of ``SIGCHLD``, which raises
    wherever the main process is, is off.

    Args:
        make: builds the loader, given its ``batch_sampler``.
        keys: the batches to read, in order.

    Raises:
        RuntimeError: the workers died three times over one batch.
        Exception: whatever reading a clip raises.
    """
    rest, owed = iter(keys), deque[Keys]()  # owed: asked for and not yet here

    def asked() -> Iterator[Keys]:
        yield from tuple(owed)
        for batch in rest:
            owed.append(batch)
            yield batch

    batches, deaths = _started(make(asked())), 0
    while True:
        death = ""
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if not _DEATH.match(str(error)):
                raise _as_raised(error) from None
            death = str(error).splitlines()[0].rstrip(".")
        if not death:
            deaths = 0
            owed.popleft()
            yield batch
            continue
        deaths += 1
        reason = f"{death}; lack of memory is the usual cause: fewer workers or a smaller cache need less"
        if deaths == _DEATHS:
            raise RuntimeError(f"the processes that read clips died {deaths} times over one batch: {reason}")
        log.warning("the processes that read clips are started again: %s", reason)
        del batches  # ends those that are left, before others take their place
        batches = _started(make(asked()))


def _as_raised(error: Exception) -> Exception:
    """The error that a worker met, of which PyTorch makes one with the worker's traceback for a message."""
    if not _CAUGHT.match(str(error)):
        return error
    return type(error)(str(error).rstrip().splitlines()[-1].partition(": ")[2])


def _started(loader: DataLoader[Batch]) -> Iterator[Batch]:
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if loader.num_workers and threading.current_thread() is threading.main_thread():
        torchs = getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if torchs or handler is None else handler)
    return batches
