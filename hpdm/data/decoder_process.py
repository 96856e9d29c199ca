"""The decoding process of this process: started at the first call, and replaced when it hangs or dies."""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

from hpdm.data.decoding import messages
from hpdm.data.decoding.messages import Message
from hpdm.data.decoding.ring import Ring

log = logging.getLogger(__name__)

COMMAND = [sys.executable, "-P", "-m", "hpdm.data.decoding"]
_START_TIMEOUT_S = 120.0  # enough for the imports on a busy machine with a slow disk
_LAUNCH = "launch"  # the stage before the process is ready for requests
_CRASHES = frozenset(
    (
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,
        signal.SIGTRAP,
    )
)  # by which a process ends through what it does itself; other signals come from outside

Transform = Callable[[np.ndarray], np.ndarray]


class _Clip:
    """Frames that arrive one by one, in one array.

    Args:
        count: of the frames.
        transform: applied to each; ``None`` to keep it as it is.
    """

    def __init__(self, count: int, transform: Transform | None) -> None:
        self.count, self.transform = count, transform
        self.frames: np.ndarray | None = None
        self.done = 0

    def restart(self) -> None:
        """Forgets the frames that have arrived."""
        self.frames, self.done = None, 0

    def add(self, frame: np.ndarray) -> None:
        """Takes a copy of the next frame, or of what becomes of it."""
        frame = frame if self.transform is None else self.transform(frame)
        if self.frames is None:
            self.frames = np.empty((self.count, *frame.shape), frame.dtype)
        self.frames[self.done] = frame
        self.done += 1


class DecoderProcess:
    """A process that decodes, and the pipes to it; safe to use from several threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.ring: Ring | None = None
        self.stage = "start"  # what the process said last that it is doing

    def call(
        self, request: Message, timeout: float, transform: Transform | None = None
    ) -> tuple[Message, np.ndarray | None]:
        """Sends a request; returns the message that ends the answer, and the frames, ``[F, ...]``, if all have come.

        An answer may take as long as it needs, as long as something is heard every ``timeout`` seconds. If nothing is,
        the process is killed, and the status is ``"stalled"`` with the stage at which it stood. A process that dies is
        replaced and asked once more. The status of a second death is ``"error"`` if the process crashed, and
        ``"stalled"`` if it was killed from outside, for lack of memory perhaps, which says nothing about the file.

        Args:
            request: as :mod:`hpdm.data.decoding.server` describes it.
            timeout: seconds.
            transform: applied to each frame, uint8 ``[H, W, 3]``, as it arrives.

        Raises:
            RuntimeError: the process does not start.
        """
        clip = _Clip(len(request.get("numbers", ())), transform)
        with self.lock:
            for attempt in range(2):
                try:
                    self.stage = "start"
                    if self.process is None or self.process.poll() is not None:
                        self.start()
                    messages.send(self._pipes()[0], {**request, "timeout": timeout})
                    clip.restart()
                    return self.collect(timeout, clip), clip.frames
                except TimeoutError:
                    self.stop()
                    if self.stage == _LAUNCH:
                        raise RuntimeError(
                            f"the decoding process did not start within {_START_TIMEOUT_S:g} s"
                        ) from None
                    error = f"no answer within {timeout:g} s, decoder stopped"
                    return {"status": "stalled", "stage": self.stage, "error": error}, None
                except (EOFError, BrokenPipeError):
                    code = self.stop()
                    crashed = code is None or code >= 0 or -code in _CRASHES
                    if crashed and self.stage == _LAUNCH:
                        raise RuntimeError(f"the decoding process did not start (exit status {code})") from None
                    died = f"the decoding process {'died' if crashed else 'was killed'} (exit status {code})"
                    if attempt == 0:
                        log.warning("%s: %s; asked once more", request["path"], died)
                except BaseException:
                    self.stop()  # else the next call would read the reply of this one as its own
                    raise
            return {"status": "error" if crashed else "stalled", "stage": self.stage, "error": died}, None

    def collect(self, timeout: float, clip: _Clip) -> Message:
        """Reads messages to the one that ends the answer, and frames into ``clip``; raises as :meth:`read`."""
        while True:
            message = self.receive(time.monotonic() + timeout)
            if message["status"] == "frame":
                clip.add(self._ring().slot(clip.done, message["shape"]))
                self._pipes()[0].write(messages.TAKEN)
            elif message["status"] == "busy":
                self.stage = message["stage"]
            elif message["status"] == "restart":
                clip.restart()
            else:
                return message

    def start(self) -> None:
        """Starts the process and waits until it is ready.

        Raises:
            TimeoutError, EOFError: as :meth:`read`.
            RuntimeError: it says why it cannot serve.
        """
        self.stage = _LAUNCH
        # The package may be on this process's path alone. Without -P, so would be its working directory.
        path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
        self.ring = Ring(_open_memory())
        self.process = subprocess.Popen(
            [*COMMAND, str(self.ring.file)], pass_fds=[self.ring.file],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        reply = self.receive(time.monotonic() + _START_TIMEOUT_S)
        if reply["status"] != "ready":
            raise RuntimeError(f"the decoding process did not start: {reply['error']}")
        self.stage = "start"

    def receive(self, deadline: float) -> Message:
        """Reads one message, without the frame that may follow it; raises as :meth:`read`."""
        head = bytearray(messages.LENGTH.size)
        self.read(head, deadline)
        body = bytearray(messages.LENGTH.unpack(head)[0])
        self.read(body, deadline)
        return json.loads(body)

    def _ring(self) -> Ring:
        """The memory in which the process leaves frames."""
        if self.ring is None:
            raise EOFError("the decoding process is not running")
        return self.ring

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """The worker's standard input and output."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise EOFError("the decoding process is not running")
        return self.process.stdin, self.process.stdout

    def read(self, into: bytearray, deadline: float) -> None:
        """Fills a buffer.

        Raises:
            TimeoutError: the bytes did not arrive by ``deadline``, a time of the monotonic clock in seconds.
            EOFError: the process ended.
        """
        pipe = self._pipes()[1].fileno()
        view = memoryview(into)
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        while view:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError
            count = os.readv(pipe, [view])
            if not count:
                raise EOFError
            view = view[count:]

    def memory(self) -> int:
        """The most bytes that the process had in memory so far; 0 where there is none, or the system does not tell."""
        if self.process is None:
            return 0
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)

    def stop(self) -> int | None:
        """Kills the worker, if there is one, and returns its exit status."""
        process, self.process = self.process, None
        self._close_ring()
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return code

    def _close_ring(self) -> None:
        ring, self.ring = self.ring, None
        if ring is not None:
            os.close(ring.file)

    def forget(self) -> None:
        """For a forked child: closes its copies of the pipes, and leaves the worker to the parent."""
        self.lock = threading.Lock()
        process, self.process = self.process, None
        self._close_ring()
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.returncode = 0  # so that Popen does not wait for a process that is not this one's child


def _open_memory() -> int:
    """Descriptor of an empty file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


process = DecoderProcess()
atexit.register(process.stop)
os.register_at_fork(after_in_child=process.forget)
