"""Colors that are stored in another way, transparency, and frames of the sizes that people have."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
from av.video.reformatter import ColorRange, Colorspace

from tests.video import claims
from tests.video.cases import Case, encoded
from tests.video.corpus_h264 import h264, hevc
from tests.video.corpus_mpeg import mpeg4
from tests.video.encoding import Video

_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2", frames=24)
_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2", frames=24)
_COLORS = {
    "bt709": (Colorspace.ITU709, ColorRange.MPEG),
    "bt709-full": (Colorspace.ITU709, ColorRange.JPEG),
    "bt601-full": (Colorspace.ITU601, ColorRange.JPEG),
    "fcc": (Colorspace.FCC, ColorRange.MPEG),
    "smpte240m": (Colorspace.SMPTE240M, ColorRange.MPEG),
}


def _marked(space: int, range_: int) -> Any:
    def prepare(stream: Any, _: int) -> None:
        stream.codec_context.colorspace, stream.codec_context.color_range = space, range_

    return prepare


def _is_marked(space: int, range_: int) -> claims.Claim:
    def claim(path: Any) -> bool:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            return (frame.colorspace, frame.color_range) == (space, range_)

    claim.__name__ = f"colors {space} of range {range_}"
    return claim


def _colors() -> list[Case]:
    return [
        encoded(f"color-{name}.{suffix}", "colors", video, _is_marked(*color), prepare=_marked(*color))
        for name, color in _COLORS.items()
        for suffix, video in (("mp4", _CLOSED), ("mkv", _OPEN))
    ]


def _transparent() -> list[Case]:
    vp9 = Video("libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}, frames=24)
    vp8 = replace(vp9, codec="libvpx")
    still = Video(frames=12, gop=None, bit_rate=None)
    kind = "transparency"
    return [
        encoded("alpha-vp9.webm", kind, replace(vp9, pix_fmt="yuva420p")),
        encoded("alpha-vp8.webm", kind, replace(vp8, pix_fmt="yuva420p")),
        encoded("alpha-prores.mov", kind, replace(still, codec="prores_ks", pix_fmt="yuva444p10le")),
        encoded("alpha-qtrle.mov", kind, replace(still, codec="qtrle", pix_fmt="argb")),
        encoded("alpha-png.mov", kind, replace(still, codec="png", pix_fmt="rgba")),
        encoded("alpha-ffv1.mkv", kind, replace(still, codec="ffv1", pix_fmt="yuva420p")),
        encoded("alpha-utvideo.avi", kind, replace(still, codec="utvideo", pix_fmt="gbrap")),
    ]


def _sizes() -> list[Case]:
    sizes = (
        (144, 176),
        (240, 320),
        (240, 426),
        (360, 480),
        (360, 640),
        (480, 854),
        (720, 1280),
        (340, 256),
        (128, 171),
    )
    cases = []
    for height, width in sizes:
        frames = 24 if height < 400 else 10
        kind, name = "sizes that people have", f"size-{width}x{height}"
        if width % 2 == 0:
            cases.append(encoded(f"{name}.mp4", kind, replace(_CLOSED, size=(height, width), frames=frames)))
        cases.append(encoded(f"{name}.avi", kind, replace(mpeg4(1, frames), size=(height, width))))
    slow = replace(_OPEN, size=(240, 320), rate=Fraction(15), time_base=Fraction(1, 15))
    cases.append(encoded("size-320x240.mkv", "sizes that people have", slow))
    high = hevc("open-gop=1:keyint=6:min-keyint=6:bframes=2", frames=10, size=(480, 854))
    cases.append(encoded("size-854x480.mkv", "sizes that people have", high))
    return cases


CASES = [*_colors(), *_transparent(), *_sizes()]
