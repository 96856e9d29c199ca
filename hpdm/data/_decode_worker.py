"""The process that decodes videos: a decoder that hangs or crashes ends this process, not the training process.

:mod:`hpdm.data.decode` runs it as a script (``python -P _decode_worker.py``) and talks to it over pipes. It imports
nothing of this package, so that starting it costs no more than importing numpy and the codecs. A message is an 8-byte
length, that many bytes of JSON, and in the reply to a ``read`` request the frames, raw uint8 ``[F, H, W, 3]``.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
import signal
import struct
import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

LENGTH = struct.Struct("<Q")
_GRACE_S = 10  # seconds beyond a request's timeout after which this process ends itself
_INDEX_CACHE = 4096  # files whose index is kept; an index takes about 8 bytes per frame


class Refused(Exception):
    """This decoder cannot read the file, or not reliably; the other one may."""


@dataclass
class Index:
    """What is known of a file after one pass over its packets; only its first frame is decoded for it."""

    stream: int  # index of the stream in the container
    number: int  # its index among the container's video streams
    frames: int
    pts: list[int] | None  # sorted presentation times, None where the container does not give one for each frame
    keyframes: list[tuple[int, int]]  # (presentation time, decoding time) of each, sorted
    height: int  # of an upright frame
    width: int
    rotation: int  # degrees counterclockwise by which a decoded frame must be turned: 0, 90, 180 or 270
    fps: float
    codec: str
    video_streams: int
    container: str  # ffmpeg's name of the format, the first where it has several
    reordered: bool  # whether frames are stored in another order than they are shown (B-frames)


def locate(request: dict[str, Any]) -> str:
    """The name that ffmpeg opens: a path, or a URL of its ``subfile`` protocol for a range of bytes of a file.

    Both decoders then read the range in place as if it were a file; nothing is copied.
    """
    path = request["path"]
    return f"subfile,,start,{request['start']},end,{request['end']},,:{path}" if "start" in request else path


def build_index(path: str) -> Index:
    """Chooses a file's video stream as ffmpeg does, reads its packets, and decodes the first frame.

    Raises:
        ValueError: no video stream, no frames, or none that can be decoded.
    """
    import av

    with av.open(path) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("holds no video stream")
        stream.codec_context.thread_count = 1
        # A frame that the container's edit list leaves out is marked as discarded: in the file, but not in the video.
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        times = [packet.pts for packet in packets if packet.pts is not None]
        pts = sorted(times)
        codec, kind = stream.codec_context.codec.canonical_name, container.format.name.split(",")[0]
        # AVI has no presentation times. Those that ffmpeg infers are right for MPEG-4 part 2 and wrong for these two.
        inferred_wrongly = kind == "avi" and codec in ("h264", "hevc")
        exact = len(pts) == len(packets) and len(set(pts)) == len(pts) and not inferred_wrongly
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        index = Index(
            stream=stream.index,
            number=[other.index for other in container.streams.video].index(stream.index),
            frames=len(packets),
            pts=pts if exact else None,
            keyframes=sorted(
                (p.pts, p.pts if p.dts is None else p.dts) for p in packets if p.is_keyframe and p.pts is not None
            ),
            height=0,
            width=0,
            rotation=0,
            fps=float(rate) if rate else 0.0,
            codec=codec,
            video_streams=len(container.streams.video),
            container=kind,
            reordered=times != pts or inferred_wrongly,
        )
        del packets
    if not index.frames:
        raise ValueError("holds no video frames")
    with av.open(path) as container:
        stream = container.streams.video[index.number]
        stream.codec_context.thread_count = 1
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError("no frame can be decoded")
        index.rotation = round(first.rotation / 90) * 90 % 360
        index.height, index.width = first.height, first.width
    if index.rotation in (90, 270):
        index.height, index.width = index.width, index.height
    return index


def read_decord(path: str, index: Index, indices: list[int]) -> np.ndarray:
    """Reads frames with decord, if it is known to see the same stream and the same frames as the index.

    Returns:
        uint8 ``[len(indices), H, W, 3]``.

    Raises:
        Refused: decord is missing, unreliable for this kind of file, or fails.
    """
    try:
        import decord
    except (ImportError, OSError) as error:  # it is not built for every platform
        raise Refused(f"decord cannot be imported: {_first_line(error)}") from None
    decord.logging.set_level(decord.logging.QUIET)
    if index.video_streams != 1:
        raise Refused(f"{index.video_streams} video streams, of which decord may pick another one")
    if index.rotation:
        raise Refused(f"frames are stored turned by {index.rotation} degrees")
    # Decord 0.6 seeks to wrong frames, without an error, in all other combinations in tests/data/test_decode.py.
    if index.reordered and not (index.codec == "h264" and index.container in ("mov", "matroska")):
        raise Refused(f"decord finds wrong frames in {index.codec} with B-frames in {index.container}")
    if index.container not in ("mov", "matroska", "avi", "asf"):
        raise Refused(f"decord finds wrong frames in {index.container}")
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        # get_batch can wait forever for a frame beyond the last one in the file.
        if len(reader) != index.frames:
            raise Refused(f"decord counts {len(reader)} frames, the container holds {index.frames}")
        frames = reader.get_batch(indices).asnumpy()
    except Refused:
        raise
    except Exception as error:  # decord raises its own classes and RuntimeError alike
        raise Refused(f"decord: {_first_line(error)}") from None
    if frames.shape != (len(indices), index.height, index.width, 3):
        raise Refused(f"decord gives shape {frames.shape}")
    return frames


def read_pyav(path: str, index: Index, indices: list[int]) -> np.ndarray:
    """Reads frames with PyAV, decoding from the keyframe before the first of them.

    Returns:
        uint8 ``[len(indices), H, W, 3]``.

    Raises:
        ValueError: a frame is damaged or cannot be decoded.
    """
    numbers = sorted(set(indices))
    images = _decode_window(path, index, numbers, seek=True)
    if images is None:
        images = _decode_window(path, index, numbers, seek=False) or {}
    missing = [i for i in numbers if i not in images]
    if missing:
        raise ValueError(f"frame {missing[0]} of {index.frames} cannot be decoded")
    return np.stack([images[i] for i in indices])


def _decode_window(path: str, index: Index, numbers: list[int], *, seek: bool) -> dict[int, np.ndarray] | None:
    """Decodes frames, each uint8 ``[H, W, 3]``, by their numbers.

    Args:
        path: as :func:`locate` gives it.
        index: of that file.
        numbers: the frames, sorted, without repeats.
        seek: start at the keyframe before the first one, or at the start of the file.

    Returns:
        Those that can be decoded; ``None`` if the seek went past the first one, so that the result is unusable.
    """
    import av
    from av.video.reformatter import VideoReformatter

    # One converter for all frames: frame.to_ndarray would set up a new one each time, which costs more than converting.
    converter = VideoReformatter()
    height, width = index.height, index.width
    if index.rotation in (90, 270):
        height, width = width, height
    images: dict[int, np.ndarray] = {}
    number_of = {pts: i for i, pts in enumerate(index.pts)} if index.pts is not None else None
    with av.open(path) as container:
        stream = container.streams.video[index.number]
        stream.codec_context.thread_count = 1
        sought = False
        if seek and index.pts is not None:
            before = bisect.bisect_right(index.keyframes, (index.pts[numbers[0]], sys.maxsize)) - 1
            if before > 0:
                # By decoding time, as mp4 seeks; starting earlier than necessary costs only time.
                container.seek(index.keyframes[before][1], stream=stream)
                sought = True
        for count, frame in enumerate(container.decode(stream)):
            number = count if number_of is None or frame.pts is None else number_of.get(frame.pts, -1)
            if sought and count == 0 and (frame.pts is None or number < 0 or number > numbers[0]):
                return None
            if number in numbers:
                if frame.is_corrupt:
                    raise ValueError(f"frame {number} of {index.frames} is damaged")
                image = converter.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
                images[number] = np.rot90(image, index.rotation // 90)
            if len(images) == len(numbers):
                break
    return images


def verify(path: str, index: Index) -> None:
    """Decodes every frame, with the codec set to fail at damage instead of concealing it.

    Raises:
        ValueError: damaged or missing frames.
    """
    import av

    with av.open(path) as container:
        stream = container.streams.video[index.number]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"err_detect": "explode+crccheck+bitstream+buffer"}
        count = 0
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError(f"frame {count} of {index.frames} is damaged")
            count += 1
    if count < index.frames:
        raise ValueError(f"only {count} of {index.frames} frames can be decoded")


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, without the time and source line that decord puts before it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)


def _quiet() -> None:
    """Turns off what ffmpeg prints."""
    import av.logging

    av.logging.set_level(av.logging.PANIC)


def receive(source: IO[bytes]) -> dict[str, Any] | None:
    """Reads one message's JSON; ``None`` at the end of the pipe."""
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return json.loads(source.read(LENGTH.unpack(head)[0]))


def send(sink: IO[bytes], message: dict[str, Any], payload: np.ndarray | None = None) -> None:
    """Writes one message."""
    body = json.dumps(message).encode()
    sink.write(LENGTH.pack(len(body)) + body)
    if payload is not None:
        sink.write(np.ascontiguousarray(payload).reshape(-1).data)
    sink.flush()


class Server:
    """Answers requests, and keeps the indices of the files it has seen."""

    def __init__(self) -> None:
        self.indices: OrderedDict[tuple[str, int, int], Index] = OrderedDict()

    def index(self, request: dict[str, Any]) -> Index:
        """The index of a video, built again when its file's size or time of modification has changed."""
        stat = os.stat(request["path"])
        url = locate(request)
        key = (url, stat.st_size, stat.st_mtime_ns)
        if key not in self.indices:
            self.indices[key] = build_index(url)
            if len(self.indices) > _INDEX_CACHE:
                self.indices.popitem(last=False)
        return self.indices[key]

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """The reply to one request, and the frames that follow it; an error becomes a reply that names it."""
        try:
            index, url = self.index(request), locate(request)
            if request["op"] == "probe":
                names = ("frames", "height", "width", "fps", "codec", "video_streams", "stream")
                return {"status": "ok", **{name: getattr(index, name) for name in names}}, None
            if request["op"] == "verify":
                verify(url, index)
                return {"status": "ok"}, None
            indices = request["indices"]
            outside = [i for i in indices if not 0 <= i < index.frames]
            if outside:
                return {"status": "index", "error": f"frame {outside[0]} asked, the video has {index.frames}"}, None
            read = {"decord": read_decord, "pyav": read_pyav}[request["decoder"]]
            frames = read(url, index, indices)
            return {"status": "ok", "shape": frames.shape}, frames
        except Refused as refusal:
            return {"status": "refused", "error": str(refusal)}, None
        except Exception as error:
            return {"status": "error", "error": _first_line(error).replace(locate(request), request["path"])}, None


def main() -> None:
    """Serves until the pipe ends."""
    # Ctrl-C reaches every process of the terminal, but the training process finishes its step and still needs clips.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = sys.stdin.buffer
    # Replies alone go to the original stdout; what a codec prints goes to stderr.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _quiet()
    except Exception as error:
        send(sink, {"status": "error", "error": f"{type(error).__name__}: {error}"})
        return
    send(sink, {"status": "ready"})
    server = Server()
    while (request := receive(source)) is not None:
        # The process that asked kills this one when it hangs; if that process is gone, the alarm does.
        signal.alarm(math.ceil(request["timeout"]) + _GRACE_S)
        send(sink, *server.answer(request))
        signal.alarm(0)


if __name__ == "__main__":
    main()
