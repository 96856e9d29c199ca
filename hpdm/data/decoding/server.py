"""Answers requests for frames, and decides which decoder reads a file.

A request is ``{"op": "probe" | "verify" | "read", "path": ..., "timeout": seconds}``, with ``start`` and ``end`` for a
range of bytes, and for ``read`` with ``numbers`` (sorted, without repeats) and ``decoder``. The answer is any number of
messages that say ``busy`` or bring a frame, and one that ends it, of status ``ok``, ``error``, ``index``, or
``stalled`` when the disk or the system failed, which says nothing about the video.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from hpdm.data.decoding import memory, with_decord
from hpdm.data.decoding.container import locate
from hpdm.data.decoding.messages import Message, Port, send
from hpdm.data.decoding.ring import Ring
from hpdm.data.decoding.scan import Scan, scan
from hpdm.data.decoding.verify import verify
from hpdm.data.decoding.with_decord import Refused, first_line
from hpdm.data.decoding.with_pyav import Changed, Reader

GRACE_S = 10  # seconds beyond a request's timeout after which this process ends itself
_MACHINE = frozenset((errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE))  # not about a file
_REPORT_S = 0.2  # seconds between two reports of progress
_KEPT_FRAMES = 200_000  # frames of the files whose scans are kept in memory, 200 bytes each
_UNEVEN = 0.15  # of the mean time between frames: frames that are farther than this from even spacing are not even


class Server:
    """Answers requests, and keeps the scans of the files it has seen.

    Args:
        port: where requests come from and answers go.
    """

    def __init__(self, port: Port) -> None:
        self.port = port
        self.readers: OrderedDict[tuple[str, int, int], Reader] = OrderedDict()
        self.reported = 0.0
        self.timeout = math.inf

    def alive(self) -> None:
        """To be called before a message, from which the other process sees that this one does not hang."""
        self.reported = time.monotonic()
        # The process that asked kills this one when it hangs; if that process is gone, the alarm does.
        signal.alarm(math.ceil(self.timeout) + GRACE_S)

    def busy(self, stage: str) -> None:
        """Says what goes on now."""
        self.alive()
        self.port.send({"status": "busy", "stage": stage})

    def progress(self, stage: str) -> Callable[[], None]:
        """A function to call at every frame, which reports now and then."""

        def report() -> None:
            if time.monotonic() - self.reported > _REPORT_S:
                self.busy(stage)

        return report

    def answer(self, request: Message) -> None:
        """Answers one request; an error becomes a message that names it."""
        self.timeout = request["timeout"]
        self.busy("start")
        try:
            end = self.serve(request)
        except Exception as error:
            end = {"status": "error", "error": first_line(error).replace(locate(request), request["path"])}
            # Of PyAV's errors, which are subclasses, the same numbers may mean a damaged file.
            if type(error) is OSError and error.errno in _MACHINE:
                end |= {"status": "stalled", "stage": "start"}
        self.port.settle()
        signal.alarm(0)
        self.port.send(end)

    def serve(self, request: Message, *, remembered: bool = True) -> Message:
        """Does what a request asks for and returns the message that ends the answer."""
        reader = self.reader(request, remembered=remembered)
        if request["op"] == "probe":
            return {"status": "ok", **describe(reader.scan)}
        if request["op"] == "verify":
            verify(reader.url, reader.scan, self.progress("verify"))
            return {"status": "ok"}
        outside = [n for n in request["numbers"] if not 0 <= n < reader.scan.frames]
        if outside:
            return {"status": "index", "error": f"frame {outside[0]} asked, the video has {reader.scan.frames}"}
        try:
            return self.read(reader, request)
        except Changed:
            if not remembered:
                return {"status": "error", "error": "two sequential decodes of it differ"}
        # The file is another one than when it was scanned, and so are the frames that were sent.
        self.port.settle()
        self.port.send({"status": "restart"})
        self.forget(request)
        return self.serve(request, remembered=False)

    def read(self, reader: Reader, request: Message) -> Message:
        """Sends the frames of a request, decoded by decord if it is asked for and trusted, else by PyAV."""
        left, doubt = list(request["numbers"]), ""
        if request["decoder"] != "pyav":
            doubt = self.doubt(reader, request)
            if not doubt:
                self.busy("decord")
                try:
                    self.send_frames(with_decord.read(reader.url, reader.scan, list(left)), left)
                    return {"status": "ok", "decoder": "decord", "doubt": ""}
                except Refused as refusal:
                    doubt = str(refusal)
            if request["decoder"] == "decord":
                return {"status": "error", "error": f"decord does not read it: {doubt}"}
        self.busy("pyav")
        self.send_frames(reader.read(list(left), self.progress("pyav")), left)
        return {"status": "ok", "decoder": "pyav", "doubt": doubt}

    def send_frames(self, frames: Iterator[np.ndarray], left: list[int]) -> None:
        """Sends frames as they come, and takes their numbers off ``left``."""
        for frame in frames:
            self.alive()
            self.port.send_frame(frame)
            left.pop(0)

    def doubt(self, reader: Reader, request: Message) -> str:
        """Why decord may not read a file, ``""`` where it may; found out once and kept with the scan."""
        scan = reader.scan
        if scan.decord is None:
            scan.decord = with_decord.why_not(scan) or ""
            try:
                for number in with_decord.telling_frames(scan) if not scan.decord else ():
                    self.busy("decord")
                    (theirs,), (ours,) = with_decord.read(reader.url, scan, [number]), reader.read([number])
                    if not np.array_equal(theirs, ours):
                        scan.decord = f"it gives another picture for frame {number}"
            except Refused as refusal:
                scan.decord = str(refusal)
            if scan.frames > 1:
                memory.save(memory.fingerprint(request), scan)
        return scan.decord

    def reader(self, request: Message, *, remembered: bool = True) -> Reader:
        """The reader of a file, scanned anew where its size or time of modification has changed."""
        stat = os.stat(request["path"])
        key = (locate(request), stat.st_size, stat.st_mtime_ns)
        if key not in self.readers:
            name = memory.fingerprint(request)
            found = memory.load(name) if remembered else None
            if found is None:
                found = scan(key[0], self.progress("scan"))
                if found.frames > 1:  # one frame, of an image, costs no more to decode than its scan to find
                    memory.save(name, found)
            self.readers[key] = Reader(key[0], found)
            while len(self.readers) > 1 and sum(r.scan.frames for r in self.readers.values()) > _KEPT_FRAMES:
                self.readers.popitem(last=False)
        self.readers.move_to_end(key)
        return self.readers[key]

    def forget(self, request: Message) -> None:
        """Drops what is known of a file."""
        for key in [key for key in self.readers if key[0] == locate(request)]:
            del self.readers[key]


def describe(scan: Scan) -> Message:
    """The fields of :class:`hpdm.data.decode.VideoInfo`, without the path."""
    height, width = scan.size
    rate, times = spacing(scan)
    return {
        "frames": scan.frames,
        "height": height,
        "width": width,
        "fps": rate,
        "codec": scan.codec,
        "video_streams": scan.video_streams,
        "stream": scan.stream,
        "pixel_aspect": scan.pixel_aspect,
        "times": None if times is None else times.tolist(),
        "damage": scan.damage(list(range(scan.frames))) or "",
    }


def spacing(scan: Scan) -> tuple[float, np.ndarray | None]:
    """The mean frames per second, 0 where nothing tells it, and the frames' times where they are not evenly spaced."""
    times = scan.times
    if times is None or len(times) < 2:
        return scan.rate, None
    frames = np.arange(len(times))
    # Containers round times, to milliseconds in Matroska. What is even but for that has the rate that is claimed.
    if scan.rate and np.abs(times - frames / scan.rate).max() <= 2 * scan.time_base:
        return scan.rate, None
    rate = (len(times) - 1) / float(times[-1])
    return rate, times if np.abs(times - frames / rate).max() * rate > _UNEVEN else None


def main() -> None:
    """Serves until the pipe ends; the last argument of the command is the descriptor of the file for frames."""
    # Ctrl-C reaches every process of the terminal, but the training process finishes its step and still needs clips.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Replies alone go to the original stdout; what a codec prints goes to stderr.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        quiet()
    except Exception as error:
        send(sink, {"status": "error", "error": f"{type(error).__name__}: {error}"})
        return
    send(sink, {"status": "ready"})
    port = Port(sys.stdin.buffer, sink, Ring(int(sys.argv[-1])))
    server = Server(port)
    while (request := port.receive()) is not None:
        server.answer(request)


def quiet() -> None:
    """Turns off what ffmpeg prints."""
    import av.logging

    av.logging.set_level(av.logging.PANIC)
