"""Reading videos: decord first, PyAV where decord cannot, each call guarded by a timeout.

**Which stream.** A container's best video stream as ffmpeg ranks them (PyAV's ``streams.best``). Decord may pick
another one, so a file with more than one video stream is read with PyAV.

**Which frames.** Frame ``i`` is the i-th in order of presentation, counted from the packets that are really in the
file, never from what its header claims: a cut-off file has the frames that are left. A file where decord counts
differently, whose frames are stored turned (phones), or of a kind where decord's seeks go wrong (B-frames other than
H.264's in mp4 and Matroska, MPEG program and transport streams) is read with PyAV, so both give the same frames. Only
the window that is asked for is decoded, from the keyframe before it.

**Hangs and crashes.** Decoding runs in a worker process of its own, one for each process that reads, started at the
first call. Past the timeout it is killed; a hang in decord is retried with PyAV, a hang in PyAV is an error that names
the file. A worker that dies is started again and asked once more, since what ended it may have been the system and not
the file; a second death counts as a failure of the decoder.

**Videos inside other files.** A :class:`Member` is read in place, the same frames as from a file of its own.
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

from hpdm.data import _decode_worker

log = logging.getLogger(__name__)

Decoder = Literal["auto", "decord", "pyav"]
DECODERS: tuple[Decoder, ...] = ("auto", "decord", "pyav")
TIMEOUT_S = 30.0
_START_TIMEOUT_S = 120.0  # imports on a busy machine with a cold disk


class DecodeError(RuntimeError):
    """A file that cannot be read as a video; the message names it."""


class Member(NamedTuple):
    """A video stored as it is inside another file, as in a tar: ``size`` bytes from byte ``offset`` of ``archive``."""

    archive: str
    name: str  # for messages
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


Source = str | os.PathLike[str] | Member


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds.

    ``frames`` counts the frames that are in the file; ``height`` and ``width`` are those of an upright frame;
    ``stream`` is the container's index of the stream that is read, out of ``video_streams``; ``fps`` is 0 where the
    container gives none.
    """

    path: str
    frames: int
    height: int
    width: int
    fps: float
    codec: str
    video_streams: int
    stream: int


class DecodedClip(NamedTuple):
    """Decoded frames and the decoder that gave them."""

    frames: np.ndarray  # uint8 RGB [F, H, W, 3]
    decoder: Literal["decord", "pyav"]


def probe(path: Source, *, timeout: float = TIMEOUT_S) -> VideoInfo:
    """Says what a video file holds, from its packets and its first frame.

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
        indices: frame numbers from 0, in any order, repeats allowed, at least one.
        decoder: ``"auto"`` tries decord and then PyAV, logging why; a named one is used or the call fails.
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
    if decoder not in DECODERS:
        raise ValueError(f"decoder: got {decoder!r}, expected one of {', '.join(DECODERS)}")
    numbers = [int(i) for i in indices]
    if not numbers:
        raise ValueError("indices: got none, expected at least one frame number")
    request = {"op": "read", **place, "indices": numbers}
    refused = _refused.get(name) if decoder == "auto" else None
    if decoder != "pyav" and refused is None:
        reply, frames = _worker.call({**request, "decoder": "decord"}, timeout)
        if frames is not None:
            return DecodedClip(frames, "decord")
        if reply["status"] == "index":
            raise IndexError(f"{name}: {reply['error']}")
        if decoder == "decord":
            raise DecodeError(f"{name}: {reply['error']}")
        # A file that decord cannot read once is not offered to it again: a hang would cost the timeout each time.
        refused = _refused[name] = str(reply["error"])
        log.info("%s: read with PyAV, not decord: %s", name, refused)
    reply, frames = _worker.call({**request, "decoder": "pyav"}, timeout)
    if frames is not None:
        return DecodedClip(frames, "pyav")
    if reply["status"] == "index":
        raise IndexError(f"{name}: {reply['error']}")
    also = f" (decord: {refused})" if refused and refused != reply["error"] else ""
    raise DecodeError(f"{name}: cannot be decoded: {reply['error']}{also}")


_refused: dict[str, str] = {}


def _locate(source: Source, timeout: float) -> tuple[str, dict[str, Any]]:
    """The name for messages, and what tells the worker where the video is."""
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout}, expected seconds > 0")
    file = source.archive if isinstance(source, Member) else source
    if not Path(file).is_file():
        raise FileNotFoundError(f"path: {file} is not a file")
    # The worker keeps the folder that it was started in, this process may change its own.
    path = os.path.abspath(file)
    if not isinstance(source, Member):
        return path, {"path": path}
    return f"{path}/{source.name}", {"path": path, "start": source.offset, "end": source.offset + source.size}


class _Worker:
    """The worker process of this process: started when needed, killed when it does not answer."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, request: dict[str, Any], timeout: float) -> tuple[dict[str, Any], np.ndarray | None]:
        """Reply and frames; a hang of the worker or its second death is a reply with an error."""
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
                    self.stop()  # an interrupt between request and reply would leave the pipe out of step
                    raise
            return {"status": "error", "error": died}, None

    def start(self) -> None:
        # -P keeps this package's folder off sys.path, where its module names would shadow others.
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
        head = self.read(_decode_worker.LENGTH.size, deadline)
        reply = json.loads(bytes(self.read(_decode_worker.LENGTH.unpack(head)[0], deadline)))
        if "shape" not in reply:
            return reply, None
        shape = tuple(reply["shape"])
        frames = np.frombuffer(self.read(int(np.prod(shape)), deadline), dtype=np.uint8).reshape(shape)
        return reply, frames

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        """What the worker reads from and writes to."""
        if self.process is None or self.process.stdin is None or self.process.stdout is None:
            raise EOFError("the decoding process is not running")
        return self.process.stdin, self.process.stdout

    def read(self, size: int, deadline: float) -> bytearray:
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
            got = os.readv(pipe, [view[done:]])
            if not got:
                raise EOFError
            done += got
        return data

    def stop(self) -> int | None:
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
        """In a forked child: the worker stays the parent's, only this process's copies of the pipes are closed."""
        self.lock = threading.Lock()
        process, self.process = self.process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            process.returncode = 0  # not ours to wait for


_worker = _Worker()
atexit.register(_worker.stop)
os.register_at_fork(after_in_child=_worker.forget)
