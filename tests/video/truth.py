"""What a file shows, by two voices that share no code with the product and never seek.

The truth is what ``ffmpeg -i FILE`` shows: of the stream that it chooses, every frame that a decoder gives when it is
fed from the first packet to the last, in the decoder's order, with the display matrix applied. :func:`sequential`
says it with PyAV, :func:`by_command` with the ffmpeg program itself.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

FFMPEG = shutil.which("ffmpeg")


def sequential(path: Path, upright: bool = True) -> list[np.ndarray]:
    """All frames of a file in order of output: uint8 RGB ``[H, W, 3]`` each, all of the first one's size.

    They are as stored if not ``upright``.
    """
    number, exif = chosen_stream(path), _exif_matrix(path)
    frames: list[np.ndarray] = []
    size: tuple[int, int] | None = None
    with av.open(str(path)) as container:
        stream = container.streams[number]
        stream.codec_context.thread_count = 1
        for frame in _decode(container, stream):
            size = size or (frame.width, frame.height)
            if (frame.width, frame.height) == size:
                image = frame.to_ndarray(format="rgb24")
            else:
                image = frame.reformat(*size, format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
            frames.append(turned(image, exif or _matrix(frame)) if upright else image)
    return frames


def same_pictures(one: Path, other: Path) -> bool:
    """Whether two files show the same frames, to the bit."""
    frames, others = sequential(one), sequential(other)
    return len(frames) == len(others) and all(np.array_equal(a, b) for a, b in zip(frames, others))


def _decode(container: Any, stream: Any) -> Any:
    """Frames out of every packet that can be decoded; the ffmpeg program goes on behind a damaged one, too."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            continue


def chosen_stream(path: Path) -> int:
    """The index of the video stream that the ffmpeg program chooses.

    It takes the largest, but a stream with packets before one without, and then a default stream before another.
    Cover art comes last. Among equals the first wins.
    """
    best, chosen = 0, None
    seen = _streams_with_packets(path)
    with av.open(str(path)) as container:
        for stream in container.streams.video:
            score = stream.codec_context.width * stream.codec_context.height
            score += 100_000_000 * (stream.index in seen)
            score += 5_000_000 * bool(stream.disposition & av.stream.Disposition.default)
            if stream.disposition & av.stream.Disposition.attached_pic:
                score = 1
            if score > best:
                best, chosen = score, stream.index
    if chosen is None:
        raise ValueError(f"{path}: no video stream")
    return chosen


def _streams_with_packets(path: Path) -> set[int]:
    with av.open(str(path)) as container:
        return {packet.stream_index for packet in container.demux() if packet.size}


def _matrix(frame: Any) -> tuple[int, int, int, int]:
    """The part of a frame's display matrix that turns and mirrors, as whole numbers."""
    for side_data in frame.side_data:
        if side_data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("=9i", bytes(side_data)[:36])[:5]
            scale = max(abs(a), abs(b), abs(c), abs(d))
            return round(a / scale), round(b / scale), round(c / scale), round(d / scale)
    return 1, 0, 0, 1


_EXIF_MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def _exif_matrix(path: Path) -> tuple[int, int, int, int] | None:
    """The matrix that a JPEG's EXIF orientation stands for; PyAV cannot list the side data of such a frame."""
    head = path.read_bytes()[:64] if path.suffix in (".jpg", ".jpeg") else b""
    at = head.find(b"Exif\0\0MM\0*")
    if at < 0:
        return None
    tag, _, _, orientation = struct.unpack(">HHIH", head[at + 16 : at + 26])
    if tag != 0x0112:
        raise ValueError(f"{path}: got EXIF tag {tag}, expected the orientation first")
    return _EXIF_MATRICES[orientation]


def turned(image: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """An image as a display matrix ``(a, b, c, d)`` shows it: pixel (x, y) goes to (ax + cy, bx + dy)."""
    a, b, c, d = matrix
    if matrix == (1, 0, 0, 1):
        return image
    if sorted(map(abs, matrix)) != [0, 0, 1, 1] or abs(a * d - b * c) != 1:
        raise ValueError(f"matrix: got {matrix}, expected one of the eight turns and mirrors")
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    result = np.empty((to_y.max() + 1, to_x.max() + 1, 3), image.dtype)
    result[to_y, to_x] = image
    return result


def by_command(path: Path, size: tuple[int, int]) -> np.ndarray:
    """All frames of a file as the ffmpeg program writes them: uint8 RGB ``[F, *size, 3]``."""
    command = [FFMPEG, "-v", "error", "-threads", "1", "-i", str(path)]
    command += ["-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    height, width = size
    whole, rest = divmod(len(done.stdout), height * width * 3)
    if rest:
        raise ValueError(f"{path}: ffmpeg wrote {len(done.stdout)} bytes, expected frames of {width}x{height}")
    return np.frombuffer(done.stdout, np.uint8).reshape(whole, height, width, 3)
