"""Turned and mirrored pictures, pixels that are not square, odd sizes, very short files."""

from __future__ import annotations

import struct
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from tests.video import claims
from tests.video.cases import Case, encoded
from tests.video.corpus_codecs import gif
from tests.video.corpus_h264 import FRAGMENTED, h264, hevc
from tests.video.corpus_mpeg import mpeg2, mpeg4
from tests.video.encoding import Video, write

_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2")
_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2")

# The part (a, b, c, d) of a display matrix: pixel (x, y) is shown at (ax + cy, bx + dy).
MATRICES = {
    "identity": (1, 0, 0, 1),
    "turned-90": (0, 1, -1, 0),
    "turned-180": (-1, 0, 0, -1),
    "turned-270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside-down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "antitransposed": (0, -1, -1, 0),
}


def _set_matrix(path: Path, matrix: tuple[float, float, float, float], height: int = 96, width: int = 160) -> None:
    """Writes a display matrix into the header of the first track of an mp4 or mov."""
    a, b, c, d = matrix
    shift_x, shift_y = (
        -min(0, a * width + c * height, a * width, c * height),
        -min(0, b * width + d * height, b * width, d * height),
    )
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    if struct.unpack(">9i", data[at : at + 36]) != (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30):
        raise ValueError(f"{path}: expected a track header with an identity matrix")
    numbers = [round(n * 65536) for n in (a, b, 0, c, d, 0, shift_x, shift_y)]
    data[at : at + 36] = struct.pack(">9i", *numbers, 1 << 30)
    path.write_bytes(data)


def _matrix_case(name: str, video: Video, matrix: tuple[float, float, float, float], **rest: Any) -> Case:
    def make(path: Path) -> None:
        write(path, video)
        _set_matrix(path, matrix)

    return Case(name, "display matrices", make, encoders=(video.codec,), **rest)


def _matrices() -> list[Case]:
    cases = []
    for name, matrix in MATRICES.items():
        wanted = (claims.with_matrix,) if name != "identity" else ()
        for suffix, video in (("mp4", _OPEN), ("mov", mpeg4(2))):
            cases.append(_matrix_case(f"matrix-{name}.{suffix}", video, matrix, claims=wanted))
    angle = (0.8660, 0.5, -0.5, 0.8660)
    refused = r"(?i)turn|rotat|angle|matrix|degree"
    cases += [
        _matrix_case("matrix-30-degrees.mp4", _OPEN, angle, refusal=refused),
        _matrix_case("matrix-sheared.mp4", _OPEN, (1, 0.5, 0, 1), refusal=refused),
        _matrix_case("matrix-scaled.mp4", _OPEN, (0, 2, -2, 0), claims=(claims.with_matrix,)),
        _matrix_case("matrix-hevc.mp4", hevc("open-gop=1:keyint=12:bframes=3"), MATRICES["turned-90"]),
    ]
    for degrees in (90, 180, 270):
        cases.append(
            encoded(
                f"matrix-turned-{degrees}.mkv",
                "display matrices",
                _OPEN,
                claims.with_matrix,
                prepare=lambda stream, _, degrees=degrees: stream.set_display_rotation(degrees),
            )
        )
    return cases


def _aspect(suffix: str) -> dict[str, float]:
    """What an MPEG-2 with pixels that are wide shows: of the few aspects of the picture that it has, the widest."""
    return {"pixel_aspect": 2.21 * 96 / 160} if suffix == "mpg" else {}


def _pixel_aspects() -> list[Case]:
    kind, wanted = "pixel aspect", claims.pixels_not_square
    return [
        encoded(f"pixels-{name}.{suffix}", kind, replace(video, pixel_aspect=aspect), wanted, **_aspect(suffix))
        for name, aspect in (("wide", Fraction(64, 45)), ("narrow", Fraction(8, 9)))
        for suffix, video in (("mp4", _CLOSED), ("mkv", _OPEN), ("mpg", mpeg2(2)), ("avi", mpeg4(2)))
        if not (suffix == "mpg" and name == "narrow")  # MPEG-2 has few aspects
    ]


# ---- few frames, odd sizes ----


def _few_frames() -> list[Case]:
    vp8 = Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    containers = [
        ("mp4", _CLOSED),
        ("fragmented.mp4", _CLOSED),
        ("mkv", _CLOSED),
        ("avi", mpeg4(0)),
        ("ts", _CLOSED),
        ("mpg", mpeg2(0)),
        ("webm", vp8),
        ("wmv", Video("wmv2")),
        ("gif", gif()),
        ("mov", Video("prores_ks", pix_fmt="yuv422p10le", bit_rate=None, gop=1)),
    ]
    cases = []
    for suffix, video in containers:
        for frames in (1, 2, 9):
            options = FRAGMENTED if suffix == "fragmented.mp4" else {}
            short = replace(video, frames=frames)
            cases.append(encoded(f"frames-{frames}.{suffix}", "very short", short, **options))
    return cases


def _odd_sizes() -> list[Case]:
    odd = (97, 161)
    vp9 = Video("libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"})
    videos = [
        ("h264.mp4", h264("keyint=12:min-keyint=12:scenecut=0:bframes=2", pix_fmt="yuv444p")),
        ("vp9.webm", vp9),
        ("mpeg4.avi", mpeg4(2)),
        ("mpeg2.mpg", mpeg2(2)),
        ("mjpeg.avi", Video("mjpeg", pix_fmt="yuvj420p", gop=1, bit_rate=3_000_000)),
        ("ffv1.mkv", Video("ffv1", bit_rate=None, gop=1)),
        ("gif.gif", gif()),
    ]
    cases = [encoded(f"odd-size-{name}", "odd sizes", replace(video, size=odd)) for name, video in videos]
    cases.append(encoded("odd-size-tiny.mp4", "odd sizes", replace(_CLOSED, size=(18, 34))))
    cases.append(encoded("odd-size-flat.mkv", "odd sizes", replace(_CLOSED, size=(16, 400))))
    return cases


CASES = [*_matrices(), *_pixel_aspects(), *_few_frames(), *_odd_sizes()]
