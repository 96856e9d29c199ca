"""What is known of a file after its first sequential decode: its frames, when they are shown, and their checksums.

The sequential decode is the truth to which every read is held. Nothing else tells how many frames a file has and which
is which: packets are too many where a codec hides frames (B-frames packed in AVI, alternate references of VP8), time
stamps are missing, repeated or inferred, and a stream may start inside of a group of pictures.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import numpy as np

from hpdm.data.decoding.container import Orientation, choose_streams, decode, open_video, orientation
from hpdm.data.decoding.keyframes import holds_idr
from hpdm.json_file import Range

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Formats whose first plane, the luminance, tells any two pictures apart. Of the others the RGB picture is taken.
_LUMA_BYTES = {
    **{f"yuv{j}{sampling}p": 1 for j in ("", "j") for sampling in (410, 411, 420, 422, 440, 444)},
    **{f"yuv{sampling}p{bits}le": 2 for sampling in (420, 422, 440, 444) for bits in (9, 10, 12, 14, 16)},
    "gray": 1,
}

Ticks = Annotated[int, Range(-(2**63), 2**63 - 1)]
"""A time stamp, in units of the stream's time base."""


@dataclass
class Scan:
    """A file's frames in the decoder's order of output, each with its time stamp and checksum, and where to seek to."""

    stream: int  # index of the stream in the container
    number: int  # its index among the container's video streams
    video_streams: int
    container: str  # ffmpeg's name of the format, the first where it has several
    codec: str
    stored_height: int
    stored_width: int
    transpose: bool
    flip_rows: bool
    flip_columns: bool
    pixel_aspect: float  # shown width of an upright frame's pixel, over its height
    rate: float  # frames per second as the container claims, 0 for none
    time_base: float  # seconds
    pixel_format: str
    packets: int = 0
    random_access: bool = True  # whether each keyframe is one behind which nothing refers to what came before
    pts: list[Ticks | None] = field(default_factory=list)
    checksums: list[Annotated[int, Range(0, 2**32 - 1)]] = field(default_factory=list)
    corrupt: list[int] = field(default_factory=list)  # frames that the decoder marks as damaged
    gaps: list[tuple[int, int]] = field(default_factory=list)  # frames, first and last, before which packets are lost
    entries: list[tuple[int, Ticks]] = field(default_factory=list)  # (keyframe, time stamp to seek to), sorted
    decord: str | None = None  # why decord may not read it, "" where it may, None where that is not known yet

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.checksums)

    @property
    def orientation(self) -> Orientation:
        """How a stored frame becomes an upright one."""
        return Orientation(self.transpose, self.flip_rows, self.flip_columns)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an upright frame."""
        size = (self.stored_height, self.stored_width)
        return size[::-1] if self.transpose else size

    @property
    def times(self) -> np.ndarray | None:
        """Seconds from the first frame to each, float64 ``[frames]``; ``None`` unless each is later than the last."""
        if None in self.pts:
            return None
        ticks = np.array(self.pts, np.int64)
        return (ticks - ticks[0]) * self.time_base if (np.diff(ticks) > 0).all() else None

    def damage(self, numbers: list[int]) -> str | None:
        """What is damaged of the sorted frames ``numbers`` or between them; ``None`` if nothing is."""
        corrupt = sorted(set(numbers) & set(self.corrupt))
        if corrupt:
            others = f", and {len(corrupt) - 1} more" if len(corrupt) > 1 else ""
            return f"frame {corrupt[0]} of {self.frames} is damaged{others}"
        gap = next((gap for gap in self.gaps if gap[0] <= numbers[-1] and numbers[0] < gap[1]), None)
        return None if gap is None else f"packets before frame {gap[0]} of {self.frames} cannot be decoded"


def checksum(frame: VideoFrame) -> int:
    """A checksum of a decoded picture."""
    depth = _LUMA_BYTES.get(frame.format.name)
    if depth is None:
        return zlib.crc32(frame.to_ndarray(format="rgb24").tobytes())
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return zlib.crc32(rows[: frame.height, : frame.width * depth].tobytes())


class _Packets:
    """What a scan notes of the packets as they pass."""

    def __init__(self, stream: VideoStream) -> None:
        self.codec = stream.codec_context.codec.canonical_name
        self.extradata = stream.codec_context.extradata
        self.stream = stream
        self.count = 0
        self.keyframes: list[tuple[int | None, int | None]] = []  # (presentation time, decoding time) of each
        self.refreshes: set[int | None] = set()  # both times of each packet that is an IDR picture of H.264

    def add(self, packet: Packet) -> None:
        """Notes a packet; the empty one at the end of the file does not count."""
        if not packet.size:
            return
        self.count += 1
        if self.codec == "h264" and holds_idr(bytes(packet), self.extradata):
            self.refreshes |= {packet.pts, packet.dts}
        if packet.is_keyframe:
            self.keyframes.append((packet.pts, packet.dts))

    def random_access(self) -> bool:
        """Whether all keyframes, those of the container's index too, are full refreshes (IDR of H.264).

        The index may mark keyframes where packets do not, and decoders seek by it.
        """
        marked = {shown for shown, _ in self.keyframes} | {
            e.timestamp for e in self.stream.index_entries if e.is_keyframe
        }
        return bool(self.refreshes) and marked <= self.refreshes

    def entries(self, pts: list[int | None], key_numbers: list[int]) -> list[tuple[int, int]]:
        """Each keyframe's number among the frames, and the time stamp to seek to, sorted; without those unknown.

        By presentation time: by decoding time, mp4 would land one keyframe early. Where packets and frames do not have
        the same times, they are matched in order.
        """
        number_of = {time: number for number, time in enumerate(pts)}
        numbers: list[int | None] = [number_of.get(shown) for shown, _ in self.keyframes]
        if None in numbers and len(key_numbers) == len(self.keyframes):
            numbers = list(key_numbers)
        targets = [decoded if shown is None else shown for shown, decoded in self.keyframes]
        return sorted((n, t) for n, t in zip(numbers, targets) if n is not None and t is not None)


def scan(url: str, progress: Callable[[], None] = lambda: None) -> Scan:
    """Decodes a file from its first packet to its end.

    Args:
        url: as :func:`~hpdm.data.decoding.container.locate` gives it.
        progress: called at every frame.

    Raises:
        ValueError: no video stream, no frame that can be decoded, or frames turned by an odd angle.
    """
    with open_video(url) as (container, _):
        numbers = choose_streams(container)
    for number in numbers:
        found = _scan_stream(url, number, progress)
        if found is not None:
            return found
    raise ValueError("holds no video frames")


def _scan_stream(url: str, number: int, progress: Callable[[], None]) -> Scan | None:
    """Scans a video stream; ``None`` for one without packets.

    Raises:
        ValueError: no frame that can be decoded, or frames turned by an odd angle.
    """
    found: Scan | None = None
    lost = 0
    key_numbers = []

    def count_lost() -> None:
        nonlocal lost
        lost += 1

    with open_video(url, number) as (container, stream):
        packets = _Packets(stream)
        for frame in decode(container, stream, packets.add, count_lost):
            if found is None:
                found = _describe(container, stream, frame)
            elif lost:
                # The decoder may hold back frames from before the loss, so its place is known to within their number.
                found.gaps.append((found.frames, found.frames + stream.codec_context.reorder_depth))
            lost = 0
            if frame.is_corrupt:
                found.corrupt.append(found.frames)
            if frame.key_frame:
                key_numbers.append(found.frames)
            found.pts.append(frame.pts)
            found.checksums.append(checksum(frame))
            progress()
        random_access = packets.random_access()
    if not packets.count:
        return None
    if found is None:
        raise ValueError("no frame can be decoded")
    found.packets, found.random_access = packets.count, random_access
    found.entries = packets.entries(found.pts, key_numbers)
    return found


def _describe(container: InputContainer, stream: VideoStream, first: VideoFrame) -> Scan:
    """A scan without frames, from the container and its first frame."""
    upright = orientation(first)
    aspect = float(stream.sample_aspect_ratio or 1)
    if upright.transpose:
        aspect = 1 / aspect
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return Scan(
        stream=stream.index,
        number=[other.index for other in container.streams.video].index(stream.index),
        video_streams=len(container.streams.video),
        container=container.format.name.split(",")[0],
        codec=stream.codec_context.codec.canonical_name,
        stored_height=first.height,
        stored_width=first.width,
        transpose=upright.transpose,
        flip_rows=upright.flip_rows,
        flip_columns=upright.flip_columns,
        pixel_aspect=aspect,
        rate=float(rate) if rate else 0.0,
        time_base=float(stream.time_base or 0),
        pixel_format=first.format.name,
    )
