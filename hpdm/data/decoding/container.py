"""Opening a file: which stream is read, how its frames are turned upright, and decoding past damage as ffmpeg does."""

from __future__ import annotations

import math
import re
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


# What a file may be. Left out are lists of other files or of addresses (concat, HLS, DASH, SDP), devices,
# and what nobody stores clips in: each format that ffmpeg reads is code that meets a stranger's bytes.
FORMATS = (
    "apng", "asf", "asf_o", "avi", "bmp_pipe", "dv", "flv", "gif", "h264", "hevc", "image2", "ivf", "jpeg_pipe", "m4v",
    "matroska", "mjpeg", "mov", "mpeg", "mpegts", "mpegvideo", "mxf", "nut", "obu", "ogg", "png_pipe", "webm",
    "webp_pipe", "yuv4mpegpipe",
)  # fmt: skip
PROTOCOLS = ("file", "subfile")  # the second reads a member of a tar, from the file
MOST_PIXELS = 8192 * 4320
"""Of a frame of a video: those of 8K. A small file can hold frames of any size, and each needs ten bytes per pixel."""
MOST_PIXELS_OF_IMAGE = 2**26
"""Of an image, which is one frame."""


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
        ValueError: it holds no video stream, or one of larger frames than :data:`MOST_PIXELS`.
    """
    options = {
        "pattern_type": "none",  # a name with %03d in it is a name, not the names of a sequence of images
        "format_whitelist": ",".join(FORMATS),
        "protocol_whitelist": ",".join(PROTOCOLS),
    }
    with _open(url, options) as container:
        stream = container.streams.video[choose_streams(container)[0] if number is None else number]
        stream.codec_context.thread_count = 1
        limit = _most_pixels(container)
        if stream.width * stream.height > limit:
            raise ValueError(f"has frames of {stream.width}x{stream.height} pixels, expected at most {limit} pixels")
        # The frames may be larger than the container says; the codec then refuses them before it asks for memory.
        stream.codec_context.options = {"max_pixels": str(limit)}
        yield container, stream


def _open(url: str, options: dict[str, str]) -> InputContainer:
    """What ffmpeg opens.

    Raises:
        ValueError: a format that is not allowed.
        FFmpegError: no video, or damaged.
    """
    import av

    try:
        return av.open(url, options=options)
    except av.error.ArgumentError as error:
        refused = re.search(r"\[(\w+)\] Format not on whitelist", str(error))
        if refused is None:
            raise
        raise ValueError(f"is in the format {refused[1]}, expected one that holds its frames itself") from None


def _most_pixels(container: InputContainer) -> int:
    is_image = container.format.name == "image2" or container.format.name.endswith("_pipe")
    return MOST_PIXELS_OF_IMAGE if is_image else MOST_PIXELS


def choose_streams(container: InputContainer) -> list[int]:
    """The video streams in the order in which the ``ffmpeg`` command prefers them, by their numbers among the video
    streams: marked as default, then of most pixels, then the first. It takes the first that holds anything.

    The picture on an album's cover is no video.

    Raises:
        ValueError: there is none.
    """
    from av.stream import Disposition

    streams = container.streams.video
    videos = [n for n, stream in enumerate(streams) if not stream.disposition & Disposition.attached_pic]
    if not videos:
        cover = " but a cover picture" if streams else ""
        raise ValueError(f"holds no video stream{cover}")

    def score(number: int) -> int:
        # ffmpeg's own weighing: a stream of more than 5 million pixels outdoes one that is marked.
        stream = streams[number]
        return stream.width * stream.height + 5_000_000 * bool(stream.disposition & Disposition.default)

    return sorted(videos, key=score, reverse=True)


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
