"""Opening a file: which stream is read, how its frames are turned upright, and decoding past damage as ffmpeg does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream


def locate(request: dict[str, Any]) -> str:
    """The name that ffmpeg opens: a path, or a URL of its ``subfile`` protocol for a range of bytes of a file.

    Both decoders then read the range in place as if it were a file; nothing is copied.
    """
    path = request["path"]
    return f"subfile,,start,{request['start']},end,{request['end']},,:{path}" if "start" in request else path


@contextmanager
def open_video(url: str, number: int | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file for decoding with one thread.

    Args:
        url: as :func:`locate` gives it.
        number: which of the container's video streams; ``None`` for the one that ffmpeg shows.

    Raises:
        ValueError: it holds no video stream.
    """
    import av

    # A name with %03d in it is a name, not the names of a sequence of images.
    with av.open(url, options={"pattern_type": "none"}) as container:
        stream = container.streams.video[number] if number is not None else choose_stream(container)
        stream.codec_context.thread_count = 1
        yield container, stream


def choose_stream(container: InputContainer) -> VideoStream:
    """The stream that the ``ffmpeg`` command takes by itself: marked as default, then of most pixels, then the first.

    The picture on an album's cover is no video.

    Raises:
        ValueError: there is none.
    """
    from av.stream import Disposition

    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        cover = " but a cover picture" if container.streams.video else ""
        raise ValueError(f"holds no video stream{cover}")

    def score(stream: VideoStream) -> int:
        # ffmpeg's own weighing: a stream of more than 5 million pixels outdoes one that is marked.
        return stream.width * stream.height + 5_000_000 * bool(stream.disposition & Disposition.default)

    return max(videos, key=score)


def decode(
    container: InputContainer,
    stream: VideoStream,
    seen: Callable[[Packet], None] = lambda packet: None,
    lost: Callable[[], None] = lambda: None,
) -> Iterator[VideoFrame]:
    """The frames of a stream from where the container stands, in the decoder's order of output.

    As the ffmpeg command does, it goes on behind a packet that cannot be decoded, and takes an unreadable rest of the
    file for its end.

    Args:
        container: as :func:`open_video` gives it.
        stream: as :func:`open_video` gives it.
        seen: called with each packet before it is decoded.
        lost: called for each packet that cannot be decoded.
    """
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:
            lost()
            yield from stream.codec_context.decode(None)
            return
        if not packet.size and packet.dts is not None:
            continue  # says that nothing changes; a decoder would take it for the end, which has no time
        seen(packet)
        try:
            frames = packet.decode()
        except av.error.EOFError:
            return
        except av.error.FFmpegError:
            lost()
            continue
        yield from frames


@dataclass(frozen=True)
class Orientation:
    """How a stored frame becomes an upright one: first transposed, then flipped."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The upright view of a stored ``[H, W, C]``."""
        if self.transpose:
            image = image.transpose(1, 0, 2)
        rows, columns = (slice(None, None, -1 if flip else 1) for flip in (self.flip_rows, self.flip_columns))
        return image[rows, columns]


def orientation(frame: VideoFrame) -> Orientation:
    """The orientation that a frame's display matrix asks for.

    The matrix ``(a, b, u, c, d, v, x, y, w)`` shows the pixel (column ``p``, row ``q``) at column ``a p + c q + x`` and
    row ``b p + d q + y`` (ISO/IEC 14496-12, 6.2.2).

    Raises:
        ValueError: it turns by an angle that is no multiple of 90 degrees.
    """
    _accept_unnamed_side_data()
    side_data = cast("Mapping[str, bytes]", frame.side_data)
    if "DISPLAYMATRIX" not in side_data:
        return Orientation()
    data = memoryview(side_data["DISPLAYMATRIX"])
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    straight, across = math.hypot(a, d), math.hypot(b, c)
    slant = math.sin(math.radians(1))  # ffmpeg, too, takes less than a degree for none
    if across <= slant * straight:
        return Orientation(flip_rows=d < 0, flip_columns=a < 0)
    if straight <= slant * across:
        return Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)
    raise ValueError(f"is shown turned by {math.degrees(math.atan2(b, a)):.0f} degrees, expected a multiple of 90")


def _accept_unnamed_side_data() -> None:
    """Lets PyAV list the side data of a frame that has a kind PyAV has no name for, such as the EXIF of a photo.

    It would raise an error and so hide the display matrix, which lies beside it.
    """
    from av.sidedata.sidedata import Type

    def unnamed(kind: type[Any], value: int) -> Any:
        member = object.__new__(kind)
        member._name_, member._value_ = f"UNNAMED_{value}", value
        return member

    if "_missing_" not in vars(Type):
        cast(Any, Type)._missing_ = classmethod(unnamed)
