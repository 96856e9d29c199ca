"""Reading frames with PyAV: from a keyframe before them where that is right, else from farther back, down to the start.

Whether it is right is not guessed from the kind of file. Every frame that is returned has the checksum that the scan
took of the same frame in sequential decoding. Where one differs, the read goes on from an earlier keyframe; behind the
first packet of the file the decode is the sequential one.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from hpdm.data.decoding.container import decode, open_video
from hpdm.data.decoding.scan import Scan, checksum

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.reformatter import VideoReformatter
    from av.video.stream import VideoStream

_NEAR = 4  # frames


class Changed(Exception):
    """The file no longer decodes to what its scan recorded."""


class Reader:
    """Reads frames of one file.

    Args:
        url: as :func:`~hpdm.data.decoding.container.locate` gives it.
        scan: of that file.
    """

    def __init__(self, url: str, scan: Scan) -> None:
        self.url, self.scan = url, scan
        # How many keyframes before the nearest one the last read had to begin to be right: 0, 1, 3, 7...
        self.back = 0
        number_of = {pts: number for number, pts in enumerate(scan.pts)}
        self.number_of = number_of if len(number_of) == scan.frames and None not in number_of else None
        # Whether pictures that no other one refers to are left out where they are not asked for.
        self.skip = self.number_of is not None

    def read(self, numbers: list[int], progress: Callable[[], None] = lambda: None) -> Iterator[np.ndarray]:
        """Yields frames as uint8 RGB ``[H, W, 3]``, upright.

        Args:
            numbers: of the frames, sorted, without repeats.
            progress: called at every frame that is decoded.

        Raises:
            ValueError: one of them is damaged.
            Changed: the file is not the one that was scanned.
        """
        damage = self.scan.damage(numbers)
        if damage is not None:
            raise ValueError(damage)
        left = list(numbers)
        while left:
            entry, skip = self._entry(left[0]), self.skip
            for image in self._read_from(entry, list(left), progress, skip=skip):
                yield image
                left.pop(0)
            if left and skip:
                self.skip = False
            elif left and entry is None:
                raise Changed
            elif left:
                self.back = 2 * self.back + 1

    def _entry(self, number: int) -> int | None:
        """The place in ``scan.entries`` of the keyframe to read a frame from, ``None`` for the file's start."""
        nearest = bisect.bisect_right(self.scan.entries, (number, float("inf"))) - 1
        place = nearest - self.back
        # The first keyframe is the start, unless the stream began inside of a group of pictures.
        return place if place > 0 else None

    def _read_from(
        self, entry: int | None, numbers: list[int], progress: Callable[[], None], *, skip: bool
    ) -> Iterator[np.ndarray]:
        """Yields the first of the frames ``numbers``, as far as they decode to what the scan recorded."""
        from av.video.reformatter import VideoReformatter

        # One converter for all frames: frame.to_ndarray would set up a new one each time, at a greater cost.
        converter, scan, wanted = VideoReformatter(), self.scan, 0
        with open_video(self.url, scan.number) as (container, stream):
            if entry is not None:
                container.seek(scan.entries[entry][1], stream=stream)
            before = self._skipper(stream, numbers) if skip else lambda packet: None
            for number, frame in self._numbered(decode(container, stream, before), entry, by_time=skip):
                progress()
                if number < numbers[wanted]:
                    continue
                if number > numbers[wanted] or checksum(frame) != scan.checksums[number]:
                    return
                yield scan.orientation.apply(self._to_rgb(frame, converter))
                wanted += 1
                if wanted == len(numbers):
                    return

    def _to_rgb(self, frame: VideoFrame, converter: VideoReformatter) -> np.ndarray:
        """The pixels of a frame, at the size of the file's first one: uint8 ``[H, W, 3]``."""
        height, width = self.scan.stored_height, self.scan.stored_width
        # Frames of another size are scaled as the ffmpeg command does it.
        how = "BICUBIC" if (frame.height, frame.width) != (height, width) else None
        return _view(converter.reformat(frame, width, height, "rgb24", interpolation=how, threads=1))

    def _skipper(self, stream: VideoStream, numbers: list[int]) -> Callable[[Packet], None]:
        """What to call with each packet before it is decoded: lets the codec leave out a picture that is not wanted."""
        context, pts = stream.codec_context, self.scan.pts
        wanted = {pts[number] for number in numbers}
        # Where packets have decoding times alone, as in AVI, a picture is shown at most a few frames from that time.
        near = pts[max(0, numbers[0] - _NEAR)]

        def choose(packet: Packet) -> None:
            if packet.pts is not None:
                needed = packet.pts in wanted
            else:
                needed = packet.dts is None or near is None or packet.dts >= near
            context.skip_frame = "DEFAULT" if needed else "NONREF"

        return choose

    def _numbered(
        self, frames: Iterator[VideoFrame], entry: int | None, *, by_time: bool
    ) -> Iterator[tuple[int, VideoFrame]]:
        """Frames with their numbers, by their time stamps where these are unique, else counted from the keyframe."""
        if entry is None and not by_time:
            yield from enumerate(frames)
        elif self.number_of is not None:
            for frame in frames:
                number = self.number_of.get(frame.pts)
                if number is not None:
                    yield number, frame
        elif entry is not None:
            count = None
            for frame in frames:
                if count is None and frame.key_frame:
                    count = self.scan.entries[entry][0]
                if count is not None:
                    yield count, frame
                    count += 1


def _view(frame: VideoFrame) -> np.ndarray:
    """The pixels of an RGB frame in its own memory: uint8 ``[H, W, 3]``."""
    plane = frame.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: frame.height, : 3 * frame.width].reshape(frame.height, frame.width, 3)
