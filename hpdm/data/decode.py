"""Reading videos with decord, or with PyAV where decord cannot, in a process of its own and under a timeout.

**Which stream.** A container's best video stream as ffmpeg ranks them (PyAV's ``streams.best``). Decord may choose
another one, so a file with more than one video stream is read with PyAV.

**Which frames.** Frame ``i`` is the i-th in order of presentation, counted from the packets that are in the file and
not from what its header claims: a file that was cut off has the frames that are left. Both decoders give the same
frames, since PyAV reads every file on which decord is unreliable: one whose frames decord counts differently, one whose
frames are stored rotated (as phones do), and kinds in which decord seeks to wrong frames (B-frames other than H.264's
in mp4 and Matroska, MPEG program and transport streams). Only the requested window is decoded, from the keyframe
before it.

**Hangs and crashes.** Each process that reads has a worker process that decodes, started at the first call. The worker
is killed when it does not answer within the timeout; after a hang in decord PyAV reads the file, after a hang in PyAV
an error names the file. A worker that dies is replaced and the request repeated once, since the operating system may
have ended it; a second death counts as a failure of the decoder.

**Videos inside other files.** A :class:`Member` is read in place, and gives the same frames as a file of its own.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from hpdm.checks import check_choice
from hpdm.data import _decode_worker

log = logging.getLogger(__name__)

Decoder = Literal["auto", "decord", "pyav"]
TIMEOUT_S = 30.0
_START_TIMEOUT_S = 120.0  # enough for the imports on a busy machine with a slow disk


class DecodeError(RuntimeError):
    """A file that cannot be read as a video; the message names it."""


class Member(NamedTuple):
    """A video stored uncompressed inside another file, such as a tar: ``size`` bytes from ``offset`` of ``archive``."""

    archive: str
    name: str  # for messages
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


Source = str | os.PathLike[str] | Member


@dataclass(frozen=True)
class VideoInfo:
    """What a video file contains."""

    path: str
    frames: int  # that are in the file, whatever its header claims
    height: int  # of an upright frame
    width: int
    fps: float  # average frames per second, 0 where the container gives none
    codec: str
    video_streams: int
    stream: int  # the container's index of the stream that is read


class DecodedClip(NamedTuple):
    """Decoded frames and the decoder that gave them."""

    frames: np.ndarray  # uint8 RGB [F, H, W, 3]
    decoder: Literal["decord", "pyav"]


def probe(path: Source, *, timeout: float = TIMEOUT_S) -> VideoInfo:
    """Describes a video file, from its packets and its first frame.

    Args:
        path: the file, or a member of one.
        timeout: seconds, > 0.

    Raises:
        FileNotFoundError: no such file.
        DecodeError: not a video, damaged beyond opening, or no answer within the timeout.
    """
    name, place = _locate(path, timeout)
    reply, _ = _worker.call({"op": "probe", **place}, timeout)
    if reply["status"] != "ok":
        raise DecodeError(f"{name}: not a readable video: {reply['error']}")
    return VideoInfo(path=name, **{key: value for key, value in reply.items() if key != "status"})


def verify(path: Source, *, timeout: float = TIMEOUT_S) -> None:
    """Decodes a whole file strictly with PyAV, to find damage that a codec would conceal in :func:`read_clip`.

    Args:
        path: the file, or a member of one.
        timeout: seconds, > 0.

    Raises:
        FileNotFoundError: no such file.
        DecodeError: not a video, a damaged one, or no answer within the timeout.
    """
    name, place = _locate(path, timeout)
    reply, _ = _worker.call({"op": "verify", **place}, timeout)
    if reply["status"] != "ok":
        raise DecodeError(f"{name}: damaged: {reply['error']}")


def read_clip(
    path: Source,
    indices: Sequence[int],
    *,
    decoder: Decoder = "auto",
    timeout: float = TIMEOUT_S,
) -> DecodedClip:
    """Decodes the frames ``indices`` of a video.

    Args:
        path: the file, or a member of one.
        indices: frame numbers from 0, at least one, in any order, with or without repeats.
        decoder: ``"auto"`` tries decord and then PyAV, and logs why; ``"decord"`` and ``"pyav"`` try that one alone.
        timeout: seconds for each decoder, > 0.

    Returns:
        Frames uint8 RGB ``[len(indices), H, W, 3]`` and the decoder that was used.

    Raises:
        FileNotFoundError: no such file.
        IndexError: a frame that the video does not have.
        ValueError: no indices, an unknown decoder, a timeout that is not positive.
        DecodeError: not a video, a damaged one, or no answer within the timeout.
    """
    name, place = _locate(path, timeout)
    check_choice("decoder", decoder, Decoder)
    numbers = [int(i) for i in indices]
    if not numbers:
        raise ValueError("indices: got none, expected at least one frame number")
    request = {"op": "read", **place, "indices": numbers}
    decord_error = _decord_errors.get(name) if decoder == "auto" else None
    if decoder != "pyav" and decord_error is None:
        reply, frames = _worker.call({**request, "decoder": "decord"}, timeout)
        if frames is not None:
            return DecodedClip(frames, "decord")
        if reply["status"] == "index":
            raise IndexError(f"{name}: {reply['error']}")
        if decoder == "decord":
            raise DecodeError(f"{name}: {reply['error']}")
        # Decord is not tried on this file again: a hang would cost the timeout every time.
        decord_error = _decord_errors[name] = str(reply["error"])
        log.info("%s: read with PyAV, not decord: %s", name, decord_error)
    reply, frames = _worker.call({**request, "decoder": "pyav"}, timeout)
    if frames is not None:
        return DecodedClip(frames, "pyav")
    if reply["status"] == "index":
        raise IndexError(f"{name}: {reply['error']}")
    also = f" (decord: {decord_error})" if decord_error and decord_error != reply["error"] else ""
    raise DecodeError(f"{name}: cannot be decoded: {reply['error']}{also}")


_decord_errors: dict[str, str] = {}  # why decord cannot read a file, by its name


def _locate(source: Source, timeout: float) -> tuple[str, dict[str, Any]]:
    """The name for messages, and the part of a request that tells the worker where the video is."""
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout}, expected seconds > 0")
    file = source.archive if isinstance(source, Member) else source
    if not Path(file).is_file():
        raise FileNotFoundError(f"path: {file} is not a file")
    # Absolute, since this process may have changed its working directory after the worker was started.
    path = os.path.abspath(file)
    if not isinstance(source, Member):
        return path, {"path": path}
    return f"{path}/{source.name}", {"path": path, "start": source.offset, "end": source.offset + source.size}


class _Worker:
    """The decoding process of this process: started at the first call, and replaced when it hangs or dies."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, request: dict[str, Any], timeout: float) -> tuple[dict[str, Any], np.ndarray | None]:
        """Sends a request; returns the reply and, for a clip, uint8 frames ``[F, H, W, 3]``.

        A worker that hangs, or dies twice over the same request, gives a reply of status ``"error"``.
        """
        with self.lock:
            for attempt in range(2):
                try:
                    if self.process is None or self.process.poll() is not None:
                        self.start()
                    _decode_worker.send(self._pipes()[0], {**request, "timeout": timeout})
                    return self.receive(time.monotonic() + timeout)
                except TimeoutError:
                    self.stop()
                    return {"status": "error", "error": f"no answer within {timeout:g} s, decoder stopped"}, None
                except (EOFError, BrokenPipeError):
                    died = f"the decoding process died (exit status {self.stop()})"
                    if attempt == 0:
                        log.warning("%s: %s; asked once more", request["path"], died)
                except BaseException:
                    self.stop()  # else the next call would read the reply of this one as its own
                    raise
            return {"status": "error", "error": died}, None

    def start(self) -> None:
        """Starts the process and waits until it is ready.

        Raises:
            RuntimeError: it did not start.
        """
        # -P keeps this package's folder out of sys.path, where its modules would hide others of the same name.
        command = [sys.executable, "-P", _decode_worker.__file__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        try:
            reply, _ = self.receive(time.monotonic() + _START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            code = self.stop()
            raise RuntimeError(f"the decoding process did not start (exit status {code}): {error}") from None
        if reply["status"] != "ready":
            self.stop()
            raise RuntimeError(f"the decoding process did not start: {reply['error']}")

    def receive(self, deadline: float) -> tuple[dict[str, Any], np.ndarray | None]:
        """Reads one reply, with its frames if it announces any; raises as :meth:`read`."""
        head = self.read(_decode_worker.LENGTH.size, deadline)
        reply = json.loads(bytes(self.read(_decode_worker.LENGTH.unpack(head)[0], deadline)))
        if "shape" not in reply:
            return reply, None
        shape = tuple(reply["shape"])
        frames = np.frombuffer(self.read(int(np.prod(shape)), deadline), dtype=np.uint8).reshape(shape)
        return reply, frames

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """The worker's standard input and output."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise EOFError("the decoding process is not running")
        return self.process.stdin, self.process.stdout

    def read(self, size: int, deadline: float) -> bytearray:
        """Reads ``size`` bytes.

        Raises:
            TimeoutError: they did not arrive by ``deadline``, a time of the monotonic clock in seconds.
            EOFError: the worker ended.
        """
        pipe = self._pipes()[1].fileno()
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        poller = select.poll()
        poller.register(pipe, select.POLLIN)
        while done < size:
            left = deadline - time.monotonic()
            if left <= 0 or not poller.poll(left * 1000):
                raise TimeoutError
            count = os.readv(pipe, [view[done:]])
            if not count:
                raise EOFError
            done += count
        return data

    def stop(self) -> int | None:
        """Kills the worker, if there is one, and returns its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return code

    def forget(self) -> None:
        """For a forked child: closes its copies of the pipes, and leaves the worker to the parent."""
        self.lock = threading.Lock()
        process, self.process = self.process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.returncode = 0  # so that Popen does not wait for a process that is not this one's child


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.forget)
