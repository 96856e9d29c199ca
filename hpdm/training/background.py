"""Work that goes on beside training: a copy of some tensors in host memory, and a thread that writes it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hpdm import distributed

logger = logging.getLogger(__name__)


class Background:
    """Runs one piece of work at a time in a thread; the next one waits for it.

    As a context manager it waits at the end, so that a process that stops loses nothing. What the work raises is raised
    by the next call of any method, or at the end unless another error is on its way, which is then followed by a line
    in the log.

    Args:
        ranks: makes the context of the work: by default it acts as the only process, and must not communicate with
            other ranks, since collectives of the main thread go on beside it.
    """

    def __init__(self, ranks: Callable[[], AbstractContextManager[None]] = distributed.single_process) -> None:
        self._ranks = ranks
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)

    def start(self, work: Callable[[], None]) -> None:
        """Starts the work once the work before it is done."""
        self.wait()

        def run() -> None:
            try:
                with self._ranks():  # of this thread alone
                    work()
            except BaseException as error:
                self._failure = error

        # No daemon: an interpreter that exits waits for the thread.
        self._thread = threading.Thread(target=run, name="hpdm-background")
        self._thread.start()

    def wait(self) -> None:
        """Waits for the work."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises what the work raised, if it did; does not wait."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class HostCopy:
    """Copies of tensors in host memory, whose buffers are kept for the next copy: they take memory as long as it lives.

    From a GPU they are made asynchronously into pinned memory: what the stream computes afterwards may overwrite the
    tensors, and :meth:`wait` makes the thread that reads the copies wait for them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._done: Any = None  # a CUDA event

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the tensors, by the same names. Earlier copies under these names are overwritten."""
        on_gpu = [t.device for t in tensors.values() if t.device.type == "cuda"]
        for name, t in tensors.items():
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != t.shape or buffer.dtype != t.dtype:
                pinned = t.device.type == "cuda"
                buffer = self._buffers[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned)
            buffer.copy_(t, non_blocking=True)
        if on_gpu:
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(on_gpu[0]))
        return {name: self._buffers[name] for name in tensors}

    def wait(self) -> None:
        """Returns once the last copies are complete."""
        if self._done is not None:
            self._done.synchronize()
