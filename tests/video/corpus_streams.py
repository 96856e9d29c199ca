"""Several video streams, cover art, and sound beside the video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.stream import Disposition

from tests.video import claims
from tests.video.cases import Case, encoded
from tests.video.corpus_h264 import FRAGMENTED, h264
from tests.video.corpus_mpeg import mpeg2, mpeg4
from tests.video.encoding import Video, mux_by_time, write
from tests.video.pictures import picture, pictures

_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2")
_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2")


def _streams(name: str, *videos: Video, default: int | None = None, **options: str) -> Case:
    """The case of several video streams, of which number ``default`` is marked."""

    def prepare(stream: Any, number: int) -> None:
        stream.disposition = Disposition.default if number == default else Disposition(0)

    def make(path: Path) -> None:
        write(path, *videos, prepare=prepare, **options)

    return Case(name, "several streams", make, (claims.several_streams,), encoders=("libx264",))


def _empty_stream(path: Path) -> None:
    """A video beside a larger stream that has no packets."""
    with av.open(str(path), "w") as out:
        streams: list[Any] = [out.add_stream("libx264", rate=25, options=dict(_OPEN.options)) for _ in range(2)]
        streams[0].height, streams[0].width = 240, 320
        streams[1].height, streams[1].width = 96, 160
        for number, image in enumerate(pictures(40)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            out.mux(streams[1].encode(frame))
        out.mux(streams[1].encode(None))


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
        Case("streams-empty-first.mkv", "several streams", _empty_stream, (claims.several_streams,)),
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


CASES = _many_streams()
