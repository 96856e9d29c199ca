"""Reading frames with decord, where it is proven to give those of the sequential decode.

Decord 0.6 seeks to wrong frames, without an error, in many kinds of files. It is right in H.264 in mp4, mov and
Matroska if every keyframe is an instantaneous refresh (IDR), every packet one frame, the time stamps rise from frame to
frame, and nothing is damaged: the scan tells all of this. What the scan cannot tell, a comparison does: two frames
around the last keyframe, where a wrong seek would show, must be those that PyAV reads. Everything else is PyAV's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from hpdm.data.decoding.scan import Scan

_CONTAINERS = ("mov", "matroska")
_PIXEL_FORMATS = ("yuv420p", "yuvj420p")
_MOST_PIXELS = 640 * 480  # decord decodes ahead: a window of 1280x720 costs it 330 MB, PyAV 80
_BATCH = 16  # frames of one call, after which the other process hears of the progress


class Refused(Exception):
    """Decord cannot read the file, or not reliably; PyAV may."""


def why_not(scan: Scan) -> str | None:
    """Why decord is not trusted with a file, from its scan; ``None`` where it may be."""
    doubts = {
        f"{scan.codec} in {scan.container}": scan.codec != "h264" or scan.container not in _CONTAINERS,
        f"{scan.video_streams} video streams": scan.video_streams != 1,
        "frames stored turned or mirrored": scan.transpose or scan.flip_rows or scan.flip_columns,
        f"pixels of format {scan.pixel_format}": scan.pixel_format not in _PIXEL_FORMATS,
        "keyframes that refer to earlier frames": not scan.random_access,
        "packets that are not one frame each": scan.packets != scan.frames,
        "time stamps that do not rise": scan.times is None,
        "damage": bool(scan.corrupt or scan.gaps),
        f"frames of more than {_MOST_PIXELS} pixels": scan.stored_height * scan.stored_width > _MOST_PIXELS,
    }
    return next((doubt for doubt, holds in doubts.items() if holds), None)


def telling_frames(scan: Scan) -> list[int]:
    """Frames, each to be read alone, that a decoder which seeks wrongly would get wrong."""
    last = scan.entries[-1][0] if scan.entries else 0
    return sorted({max(0, last - 1), min(last + 1, scan.frames - 1)})


def read(url: str, scan: Scan, numbers: list[int]) -> Iterator[np.ndarray]:
    """Yields frames as uint8 RGB ``[H, W, 3]``.

    Args:
        url: as :func:`~hpdm.data.decoding.container.locate` gives it.
        scan: of that file.
        numbers: of the frames, sorted, without repeats.

    Raises:
        Refused: decord is missing, counts other frames than the scan, or fails.
    """
    try:
        import decord
    except (ImportError, OSError) as error:  # it is not built for every platform
        raise Refused(f"decord cannot be imported: {first_line(error)}") from None
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(url, ctx=decord.cpu(0), num_threads=1)
        # get_batch can wait forever for a frame beyond the last one in the file.
        if len(reader) != scan.frames:
            raise Refused(f"decord counts {len(reader)} frames of {scan.frames}")
        for first in range(0, len(numbers), _BATCH):
            frames = reader.get_batch(numbers[first : first + _BATCH]).asnumpy()
            if frames.shape[1:] != (*scan.size, 3):
                raise Refused(f"decord gives frames of shape {frames.shape[1:]}")
            yield from frames
    except Refused:
        raise
    except Exception as error:  # decord raises its own classes and RuntimeError alike
        raise Refused(f"decord: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the time and source line that decord puts before it."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", line)
