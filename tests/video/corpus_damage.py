"""Damage in the middle of a file, and pictures that change their size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.video import claims
from tests.video.cases import DAMAGED, Case
from tests.video.corpus_h264 import h264, hevc
from tests.video.corpus_mpeg import mpeg2, mpeg4
from tests.video.encoding import Chunk, Video, encoded_beside, read_chunks, remux, write
from tests.video.surgery import damage, flipped, shortened, zeroed
from tests.video.truth import same_pictures

_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2")
_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3")
_NO_B = h264("keyint=12:min-keyint=12:scenecut=0:bframes=0")
_HEVC_OPEN = hevc("open-gop=1:keyint=12:min-keyint=12:bframes=3")
_CONCEALED = "the missing part of a damaged picture shows what was in memory"


def _damaged(name: str, video: Video, number: int, change: Callable[[bytes], bytes], **rest: Any) -> Case:
    """The case of one packet whose content is changed."""

    def make(path: Path) -> None:
        with encoded_beside(path, path.suffix[1:], video) as source:
            remux(source, path, lambda chunks: damage(chunks, number, change))
            assert not same_pictures(source, path), f"{name} shows what it shows without damage"

    return Case(name, "damage", make, encoders=(video.codec,), may_refuse=DAMAGED, **rest)


def _dropped(name: str, video: Video, number: int) -> Case:
    """The case of one packet that is missing."""

    def make(path: Path) -> None:
        with encoded_beside(path, path.suffix[1:], video) as source:
            remux(source, path, lambda chunks: chunks[:number] + chunks[number + 1 :])
            assert not same_pictures(source, path), f"{name} shows what it shows without damage"

    return Case(name, "damage", make, encoders=(video.codec,), may_refuse=DAMAGED)


def _lost_packets(name: str, video: Video, number: int, count: int = 1) -> Case:
    """The case of a transport stream without some of its packets of 188 bytes."""

    def make(path: Path) -> None:
        with encoded_beside(path, "ts", video) as source:
            data = source.read_bytes()
            path.write_bytes(data[: 188 * number] + data[188 * (number + count) :])
            assert not same_pictures(source, path), f"{name} shows what it shows without damage"

    return Case(name, "damage", make, encoders=(video.codec,), may_refuse=DAMAGED)


def _damage() -> list[Case]:
    vp8 = Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    vp9 = Video("libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"})
    wmv2, mjpeg = Video("wmv2"), Video("mjpeg", pix_fmt="yuvj420p", gop=1, bit_rate=3_000_000)
    return [
        _damaged("damage-flipped.mp4", _CLOSED, 17, flipped),
        _damaged("damage-keyframe.mp4", _CLOSED, 12, flipped),
        _damaged("damage-zeroed.mkv", _OPEN, 17, zeroed),
        _damaged("damage-shortened.mp4", _NO_B, 18, shortened),
        _damaged("damage-flipped.avi", mpeg4(2), 16, flipped),
        _damaged("damage-shortened.avi", mpeg4(0), 16, shortened),
        _damaged("damage-flipped.ts", _CLOSED, 17, flipped),
        _damaged("damage-mpeg2.mpg", mpeg2(2), 17, flipped),
        _damaged("damage-mpeg2.ts", mpeg2(2), 12, zeroed),
        _damaged("damage-hevc.mp4", _HEVC_OPEN, 17, flipped),
        _damaged("damage-vp8.webm", vp8, 17, shortened, by_command=_CONCEALED, undefined=range(17, 24)),
        _damaged("damage-vp9.webm", vp9, 17, flipped),
        _damaged("damage-mjpeg.avi", mjpeg, 17, shortened, by_command=_CONCEALED, undefined=range(17, 18)),
        _damaged("damage-mjpeg-no-picture.avi", mjpeg, 17, lambda data: bytes(len(data))),
        _damaged("damage-wmv2.wmv", wmv2, 17, flipped),
        _dropped("damage-dropped.mp4", _NO_B, 17),
        _dropped("damage-dropped-b.mkv", _CLOSED, 16),
        _dropped("damage-dropped-reference.mkv", _OPEN, 13),
        _dropped("damage-dropped.avi", mpeg4(2), 16),
        _dropped("damage-dropped-vp9.webm", vp9, 17),
        _lost_packets("damage-lost-h264.ts", _CLOSED, 200),
        _lost_packets("damage-lost-more-h264.ts", _CLOSED, 200, 60),
        _lost_packets("damage-lost-mpeg2.ts", mpeg2(2), 150),
    ]


# ---- pictures that change their size ----


def _two_sizes(container: str, video: Video) -> Callable[[Path], None]:
    """Pictures of one size and behind them larger ones, in one stream."""

    def make(path: Path) -> None:
        parts = []
        for size in (video.size, (128, 192)):
            part = path.with_suffix(f".{size[0]}.{container}")
            write(part, replace(video, frames=20, size=size))
            parts.append(part)
        if container == "ts":
            path.write_bytes(b"".join(part.read_bytes() for part in parts))
        else:
            more, _ = read_chunks(parts[1])
            remux(parts[0], path, lambda chunks: chunks + _behind(chunks, more))
        for part in parts:
            part.unlink()

    return make


def _behind(chunks: list[Chunk], more: list[Chunk]) -> list[Chunk]:
    step = (chunks[1].dts or 0) - (chunks[0].dts or 0)
    later = (chunks[-1].dts or 0) + step - (more[0].dts or 0)
    return [replace(c, pts=(c.pts or 0) + later, dts=(c.dts or 0) + later) for c in more]


def _two_formats(path: Path) -> None:
    """Pictures with half of the color and behind them pictures with all of it, in one stream."""
    parts = []
    for pix_fmt in ("yuv420p", "yuv444p"):
        with encoded_beside(path, "ts", replace(_CLOSED, frames=20, pix_fmt=pix_fmt)) as part:
            parts.append(part.read_bytes())
    path.write_bytes(b"".join(parts))


def _sizes() -> list[Case]:
    vp8 = Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    mjpeg = Video("mjpeg", pix_fmt="yuvj420p", gop=1, bit_rate=3_000_000)
    files = [
        ("sizes-change-h264.ts", "ts", _CLOSED),
        ("sizes-change-mpeg2.ts", "ts", mpeg2(2)),
        ("sizes-change-vp8.webm", "webm", vp8),
        ("sizes-change-vp9.webm", "webm", replace(vp8, codec="libvpx-vp9")),
        ("sizes-change-mjpeg.avi", "avi", mjpeg),
    ]
    return [
        Case(
            name,
            "size changes",
            _two_sizes(container, video),
            (claims.sizes_change,),
            may_refuse=r"(?i)size|resolution|\d+ ?x ?\d+",
            encoders=(video.codec,),
        )
        for name, container, video in files
    ] + [
        Case(
            "format-changes-h264.ts",
            "size changes",
            _two_formats,
            (claims.shows([*range(20), *range(20)]),),
            may_refuse=r"(?i)format|change",
            encoders=("libx264",),
        )
    ]


CASES = [*_damage(), *_sizes()]
