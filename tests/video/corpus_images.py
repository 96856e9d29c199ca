"""Image files, as clips of one frame."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av

from tests.video.cases import Case
from tests.video.encoding import Video, write
from tests.video.pictures import picture

_KIND = "images"


def _image(codec: str, pix_fmt: str, size: tuple[int, int] = (96, 160), number: int = 5) -> bytes:
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = size
    context.pix_fmt, context.time_base = pix_fmt, Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24").reformat(format=pix_fmt)
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def _with_orientation(jpeg: bytes, orientation: int) -> bytes:
    """A JPEG with the EXIF tag by which cameras say how the picture was held."""
    tag = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    exif = b"Exif\0\0" + b"MM\0*" + struct.pack(">IH", 8, 1) + tag + struct.pack(">I", 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def _case(name: str, content: Callable[[], bytes], encoder: str) -> Case:
    return Case(name, _KIND, lambda path: _write(path, content()), encoders=(encoder,))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _formats() -> list[Case]:
    return [
        _case(f"image-{name}", lambda codec=codec, pix_fmt=pix_fmt, size=size: _image(codec, pix_fmt, size), codec)
        for name, codec, pix_fmt, size in (
            ("rgb.png", "png", "rgb24", (96, 160)),
            ("alpha.png", "png", "rgba", (96, 160)),
            ("gray.png", "png", "gray", (96, 160)),
            ("16-bit.png", "png", "rgb48be", (96, 160)),
            ("odd.png", "png", "rgb24", (97, 161)),
            ("420.jpg", "mjpeg", "yuvj420p", (96, 160)),
            ("444.jpeg", "mjpeg", "yuvj444p", (96, 160)),
            ("odd.jpg", "mjpeg", "yuvj420p", (97, 161)),
            ("lossy.webp", "libwebp", "yuv420p", (96, 160)),
            ("lossless.webp", "libwebp", "bgra", (96, 160)),
        )
    ]


def _turned() -> list[Case]:
    return [
        _case(
            f"image-orientation-{orientation}.jpg",
            lambda orientation=orientation: _with_orientation(_image("mjpeg", "yuvj420p"), orientation),
            "mjpeg",
        )
        for orientation in range(1, 9)
    ]


def _animated(codec: str, format: str) -> Callable[[Path], None]:
    return lambda path: write(
        path,
        Video(codec, frames=12, pix_fmt="rgba" if codec == "apng" else "bgra", bit_rate=None, gop=None),
        format=format,
    )


def _moving() -> list[Case]:
    return [
        Case("image-animated.png", _KIND, _animated("apng", "apng"), encoders=("apng",)),
        Case(
            "image-animated.webp",
            _KIND,
            _animated("libwebp_anim", "webp"),
            encoders=("libwebp_anim",),
            refusal=r"(?i)webp|anim|decod|invalid|frame|video",
        ),
    ]


CASES = [*_formats(), *_turned(), *_moving()]
