"""Turned and mirrored pictures, pixels that are not square, several streams, odd sizes, very short files."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from tests.video import claims
from tests.video.cases import Case, encoded
from tests.video.corpus_codecs import gif
from tests.video.corpus_h264 import FRAGMENTED, h264, hevc
from tests.video.corpus_mpeg import mpeg2, mpeg4
from tests.video.encoding import Video, mux_by_time, write
from tests.video.pictures import picture

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


def _pixel_aspects() -> list[Case]:
    kind, wanted = "pixel aspect", claims.pixels_not_square
    return [
        encoded(f"pixels-{name}.{suffix}", kind, replace(video, pixel_aspect=aspect), wanted)
        for name, aspect in (("wide", Fraction(64, 45)), ("narrow", Fraction(8, 9)))
        for suffix, video in (("mp4", _CLOSED), ("mkv", _OPEN), ("mpg", mpeg2(2)), ("avi", mpeg4(2)))
        if not (suffix == "mpg" and name == "narrow")  # MPEG-2 has few aspects
    ]


# ---- several streams ----


def _streams(name: str, *videos: Video, default: int | None = None, **options: str) -> Case:
    """The case of several video streams, of which number ``default`` is marked."""

    def prepare(stream: Any, number: int) -> None:
        stream.disposition = Disposition.default if number == default else Disposition(0)

    def make(path: Path) -> None:
        write(path, *videos, prepare=prepare, **options)

    return Case(name, "several streams", make, (claims.several_streams,), encoders=("libx264",))


def _cover(cover_first: bool, marked: bool = True) -> Callable[[Path], None]:
    """A video with a still picture beside it, ``marked`` as cover art as music shops and downloaders do."""

    def make(path: Path) -> None:
        cover = av.CodecContext.create("mjpeg", "w")
        cover.width, cover.height, cover.pix_fmt, cover.time_base = 320, 240, "yuvj420p", Fraction(1, 25)
        image = av.VideoFrame.from_ndarray(picture(77, 240, 320), format="rgb24").reformat(format="yuvj420p")
        image.pts = 0
        packets = [*cover.encode(image), *cover.encode(None)]
        with av.open(str(path), "w") as out:
            order = ("cover", "video") if cover_first else ("video", "cover")
            streams: dict[str, Any] = {}
            for kind in order:
                streams[kind] = out.add_stream("mjpeg" if kind == "cover" else "libx264", rate=25)
            art, stream = streams["cover"], streams["video"]
            art.width, art.height, art.pix_fmt = 320, 240, "yuvj420p"
            art.disposition = Disposition.attached_pic if marked else Disposition(0)
            stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
            stream.options = dict(_OPEN.options)
            video = []
            for number in range(40):
                frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                video += stream.encode(frame)
            video += stream.encode(None)
            still = av.Packet(bytes(packets[0]))
            still.stream, still.pts, still.dts, still.time_base = art, 0, 0, Fraction(1, 25)
            still.is_keyframe = True
            mux_by_time(out, [[still], video])

    return make


def _many_streams() -> list[Case]:
    small, large = replace(_OPEN, size=(64, 96), seed=1), _OPEN
    slow = replace(small, frames=20, rate=Fraction(10), time_base=Fraction(1, 10))
    cases = []
    for suffix in ("mp4", "mkv", "mov"):
        cases += [
            _streams(f"streams-larger-second.{suffix}", small, large),
            _streams(f"streams-larger-first.{suffix}", large, small),
            _streams(f"streams-smaller-default.{suffix}", large, small, default=1),
            _streams(f"streams-equal-second-default.{suffix}", replace(large, seed=1), large, default=1),
        ]
    cases += [
        _streams("streams-larger-second.ts", small, large),
        _streams("streams-larger-second.avi", replace(mpeg4(0), size=(64, 96), seed=1), mpeg4(0)),
        _streams("streams-different-rates.mp4", slow, large),
        _streams("streams-three.mkv", small, large, replace(small, seed=2)),
        Case("cover-second.mp4", "cover art", _cover(False), (claims.several_streams,)),
        Case("cover-first.mp4", "cover art", _cover(True), (claims.several_streams,)),
        # Without a mark as cover art the larger picture is a video stream like another, and of one frame.
        Case("still-second.mov", "several streams", _cover(False, marked=False), (claims.several_streams,)),
        Case("still-second.mkv", "several streams", _cover(False, marked=False), (claims.several_streams,)),
    ]
    for suffix, video in (
        ("mp4", _OPEN),
        ("mkv", _OPEN),
        ("ts", _OPEN),
        ("avi", mpeg4(2)),
        ("mpg", mpeg2(2)),
        ("mov", _CLOSED),
    ):
        cases.append(encoded(f"sound.{suffix}", "sound beside the video", video, sound=True))
    cases.append(encoded("sound-fragmented.mp4", "sound beside the video", _OPEN, sound=True, **FRAGMENTED))
    return cases


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


CASES = [*_matrices(), *_pixel_aspects(), *_many_streams(), *_few_frames(), *_odd_sizes()]
