"""The process that decodes: decord and PyAV behind a pipe, so that a hang or a crash costs a process, not a run.

Run as a script (``python -P _decode_worker.py``) by :mod:`hpdm.data.decode`; it imports nothing of this package, so it
starts in the time that numpy and the codecs need. A message is an 8-byte length, that many bytes of JSON, and in a
reply to ``read`` the frames, raw uint8 ``[F, H, W, 3]``.
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
_GRACE_S = 10
_INDEX_CACHE = 4096  # files whose index is remembered; an index is about 8 bytes a frame


class Refused(Exception):
    """A decoder that cannot read this file reliably; another one may."""


@dataclass
class Index:
    """What one pass over a file's packets tells: no frame but the first is decoded for it."""

    stream: int  # the container's number of the stream
    number: int  # its number among the container's video streams
    frames: int
    pts: list[int] | None  # sorted presentation times, None where the container does not give one for each frame
    keyframes: list[tuple[int, int]]  # (pts, dts) of the keyframes, sorted
    height: int
    width: int
    rotation: int  # degrees counter-clockwise by which a decoded frame must be turned: 0, 90, 180 or 270
    fps: float
    codec: str
    video_streams: int
    container: str  # ffmpeg's name of the format, the first where it has several
    reordered: bool  # whether frames are stored in another order than they are shown (B-frames)


def locate(request: dict[str, Any]) -> str:
    """What ffmpeg opens: a path, or its ``subfile`` protocol where the video is a range of bytes of a file.

    Both decoders read the range in place, as a file of its own: nothing is copied, and a seek reads what it needs.
    """
    path = request["path"]
    return f"subfile,,start,{request['start']},end,{request['end']},,:{path}" if "start" in request else path


def build_index(path: str) -> Index:
    """Reads a file's packets, chooses its video stream as ffmpeg does, and decodes the first frame."""
    import av

    with av.open(path) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("holds no video stream")
        stream.codec_context.thread_count = 1
        # Frames outside of an edit list are marked as discarded: they are in the file but not in the video.
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        times = [packet.pts for packet in packets if packet.pts is not None]
        pts = sorted(times)
        codec, kind = stream.codec_context.codec.canonical_name, container.format.name.split(",")[0]
        # AVI has no presentation times; those that ffmpeg infers are right for MPEG-4 part 2 and wrong for these two.
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
    """Reads frames with decord, where it provably sees the same stream and the same frames as the index."""
    try:
        import decord
    except (ImportError, OSError) as error:  # there are platforms for which it is not built
        raise Refused(f"decord cannot be imported: {_first_line(error)}") from None
    decord.logging.set_level(decord.logging.QUIET)
    if index.video_streams != 1:
        raise Refused(f"{index.video_streams} video streams, of which decord may pick another one")
    if index.rotation:
        raise Refused(f"frames are stored turned by {index.rotation} degrees")
    # Decord 0.6 seeks to wrong frames, without a word, in every other combination that was tried.
    if index.reordered and not (index.codec == "h264" and index.container in ("mov", "matroska")):
        raise Refused(f"decord finds wrong frames in {index.codec} with B-frames in {index.container}")
    if index.container not in ("mov", "matroska", "avi", "asf"):
        raise Refused(f"decord finds wrong frames in {index.container}")
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        # Beyond the true end get_batch can wait forever.
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
    """Reads frames with PyAV, decoding from the keyframe before the window to its end."""
    wanted = sorted(set(indices))
    found = _decode_window(path, index, wanted, seek=True)
    if found is None:
        found = _decode_window(path, index, wanted, seek=False)
    if found is None or len(found) < len(wanted):
        missing = next(i for i in wanted if found is None or i not in found)
        raise ValueError(f"frame {missing} of {index.frames} cannot be decoded")
    return np.stack([found[i] for i in indices])


def _decode_window(path: str, index: Index, wanted: list[int], *, seek: bool) -> dict[int, np.ndarray] | None:
    """Decodes the wanted frames; ``None`` where the seek did not land before the first of them."""
    import av
    from av.video.reformatter import VideoReformatter

    # One converter for all frames: frame.to_ndarray would set up its own each time, 1 ms at 64 x 64.
    convert = VideoReformatter()
    height, width = index.height, index.width
    if index.rotation in (90, 270):
        height, width = width, height
    found: dict[int, np.ndarray] = {}
    number = {pts: i for i, pts in enumerate(index.pts)} if index.pts is not None else None
    with av.open(path) as container:
        stream = container.streams.video[index.number]
        stream.codec_context.thread_count = 1
        sought = False
        if seek and index.pts is not None:
            before = bisect.bisect_right(index.keyframes, (index.pts[wanted[0]], sys.maxsize)) - 1
            if before > 0:
                # By dts: mp4 seeks in decoding order, and an earlier landing only costs time.
                container.seek(index.keyframes[before][1], stream=stream)
                sought = True
        for count, frame in enumerate(container.decode(stream)):
            position = count if number is None or frame.pts is None else number.get(frame.pts, -1)
            if sought and count == 0 and (frame.pts is None or position < 0 or position > wanted[0]):
                return None
            if position in wanted:
                if frame.is_corrupt:
                    raise ValueError(f"frame {position} of {index.frames} is damaged")
                image = convert.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
                found[position] = np.rot90(image, index.rotation // 90)
            if len(found) == len(wanted):
                break
    return found


def verify(path: str, index: Index) -> None:
    """Decodes every frame, with the codec told to give up at damage rather than to conceal it."""
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
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)  # decord's time and place in its source


def _quiet() -> None:
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
    """Answers requests; remembers the indices of files that have not changed."""

    def __init__(self) -> None:
        self.indices: OrderedDict[tuple[str, int, int], Index] = OrderedDict()

    def index(self, request: dict[str, Any]) -> Index:
        """The index of a video, by its place and its file's size and time of change."""
        stat = os.stat(request["path"])
        place = locate(request)
        key = (place, stat.st_size, stat.st_mtime_ns)
        if key not in self.indices:
            self.indices[key] = build_index(place)
            if len(self.indices) > _INDEX_CACHE:
                self.indices.popitem(last=False)
        return self.indices[key]

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        """Reply and frames for one request; errors become replies."""
        try:
            index, place = self.index(request), locate(request)
            if request["op"] == "probe":
                names = ("frames", "height", "width", "fps", "codec", "video_streams", "stream")
                return {"status": "ok", **{name: getattr(index, name) for name in names}}, None
            if request["op"] == "verify":
                verify(place, index)
                return {"status": "ok"}, None
            indices = request["indices"]
            outside = [i for i in indices if not 0 <= i < index.frames]
            if outside:
                return {"status": "index", "error": f"frame {outside[0]} asked, the video has {index.frames}"}, None
            read = {"decord": read_decord, "pyav": read_pyav}[request["decoder"]]
            frames = read(place, index, indices)
            return {"status": "ok", "shape": frames.shape}, frames
        except Refused as refusal:
            return {"status": "refused", "error": str(refusal)}, None
        except Exception as error:
            return {"status": "error", "error": _first_line(error).replace(locate(request), request["path"])}, None


def main() -> None:
    """Serves until the pipe ends."""
    # Ctrl-C reaches every process of a terminal; a run that ends in order still reads clips.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = sys.stdin.buffer
    # Replies own the real stdout; whatever a codec prints goes to stderr.
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
        # Whoever asked kills this process when it hangs; should the asker be gone, the alarm does.
        signal.alarm(math.ceil(request["timeout"]) + _GRACE_S)
        send(sink, *server.answer(request))
        signal.alarm(0)


if __name__ == "__main__":
    main()
