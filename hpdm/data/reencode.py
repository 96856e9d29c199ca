"""Videos encoded anew so that random windows of them are read fast: small frames in short groups of pictures.

The codec is H.264 with a keyframe every 16 frames and without the tools that make decoding slow (B-frames, arithmetic
coding, the deblocking filter). Motion JPEG is read as fast, but its files are three times as large.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from hpdm.data.decode import TIMEOUT_S, DecodeError, Source, VideoInfo, probe, read_clip
from hpdm.data.resize import resizing

KEYFRAME_EVERY = 16
_X264 = {
    "preset": "veryfast",
    "tune": "fastdecode",
    "crf": "18",
    "g": str(KEYFRAME_EVERY),
    "bf": "0",
    # One thread and no macroblock tree: with them, equal frames would not give equal bytes.
    "threads": "1",
    "x264-params": "mbtree=0:scenecut=0",
}
_TICKS = 90_000  # units of time in a second, where frames are not evenly spaced
_PIECE_BYTES = 128 << 20  # of frames that are in memory at a time


def shown_size(info: VideoInfo, side: int) -> tuple[int, int]:
    """Height and width of a clip's frames in square pixels, with a shorter side of at most ``side``.

    Both are even, as 4:2:0 needs, so ``side`` is rounded to an even number. Nothing is enlarged, but for that.
    """
    height, width = info.height, info.width * info.pixel_aspect
    scale = min(1.0, side / min(height, width))
    return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


def reencode(source: Source, path: str | os.PathLike[str], side: int, *, timeout: float = TIMEOUT_S) -> None:
    """Writes all frames of a video, upright and in square pixels, as an mp4 for training.

    The number of frames and their times stay. Equal frames give equal bytes.

    Args:
        source: the file, or a member of one.
        path: the mp4 to write.
        side: pixels of the shorter side, >= 16; smaller frames keep their size.
        timeout: as :func:`hpdm.data.decode.read_clip`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: ``side`` below 16.
        DecodeError: not a video, damaged anywhere, or without a frame rate.
        StalledError: as :func:`hpdm.data.decode.read_clip`.
    """
    import av

    if side < 16:
        raise ValueError(f"side: got {side}, expected at least 16")
    info = probe(source, timeout=timeout)
    if not info.fps and info.times is None:
        raise DecodeError(f"{info.path}: nothing tells its frame rate")
    height, width = shown_size(info, side)
    base, ticks = _clock(info)
    with av.open(os.fspath(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(info.fps).limit_denominator(100_000) or 1)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = dict(_X264)
        stream.codec_context.time_base = base
        for image, tick in zip(_frames(source, info, (height, width), timeout), ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = tick, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _clock(info: VideoInfo) -> tuple[Fraction, list[int]]:
    """A unit of time in seconds, and the time of each frame in it."""
    if info.times is None:
        return 1 / Fraction(info.fps).limit_denominator(100_000), list(range(info.frames))
    return Fraction(1, _TICKS), [round(time * _TICKS) for time in info.times]


def _frames(source: Source, info: VideoInfo, size: tuple[int, int], timeout: float) -> Iterator[np.ndarray]:
    """All frames at their new size, uint8 ``[height, width, 3]``, read in pieces that fit in memory."""
    piece = max(KEYFRAME_EVERY, _PIECE_BYTES // (3 * size[0] * size[1]))
    for first in range(0, info.frames, piece):
        numbers = range(first, min(first + piece, info.frames))
        yield from read_clip(source, numbers, timeout=timeout, transform=resizing(size, info.pixel_aspect)).frames
