"""Windows Media, VP8, VP9, AV1, GIF, and codecs whose every frame stands alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from tests.video import claims
from tests.video.cases import Case, encoded
from tests.video.corpus_h264 import h264
from tests.video.corpus_mpeg import surgical
from tests.video.encoding import Chunk, Video


def _windows_media() -> list[Case]:
    kind = "ASF"
    cases = [encoded(f"{codec}.wmv", kind, Video(codec)) for codec in ("wmv1", "wmv2", "msmpeg4v2", "msmpeg4", "mpeg4")]
    cases += [
        encoded(f"wmv2-packets-of-{size}.wmv", kind, Video("wmv2"), packet_size=size)
        for size in ("500", "1500", "9000")
    ]
    open_gop = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"
    cases += [
        encoded("wmv2-long-gop.wmv", kind, Video("wmv2", gop=300), claims.one_keyframe),
        encoded("wmv2-sound.wmv", kind, Video("wmv2"), sound=True),
        encoded("mpeg4-b-frames.wmv", kind, Video("mpeg4", b_frames=2), claims.b_vops),
        encoded("h264-open-gop.wmv", kind, h264(open_gop)),
        encoded("wmv2.avi", "Windows Media in AVI", Video("wmv2")),
        encoded("msmpeg4.avi", "Windows Media in AVI", Video("msmpeg4")),
        encoded("msmpeg4v2.avi", "Windows Media in AVI", Video("msmpeg4v2")),
    ]
    return cases


_FAST = {"deadline": "realtime", "cpu-used": "8", "threads": "1"}


def _hide(every: int) -> Callable[[list[Chunk]], list[Chunk]]:
    """Makes frames of VP8 that are decoded and not shown, as alternate references are."""

    def change(chunks: list[Chunk]) -> list[Chunk]:
        hidden = []
        for number, chunk in enumerate(chunks):
            data = bytes([chunk.data[0] & ~16]) + chunk.data[1:] if number % every == 1 else chunk.data
            hidden.append(replace(chunk, data=data))
        return hidden

    return change


def _web() -> list[Case]:
    vp8 = Video("libvpx", options=_FAST, gop=12)
    vp9, low_delay = Video("libvpx-vp9", options=_FAST), {"preset": "12", "svtav1-params": "lp=1:pred-struct=1"}
    av1 = Video("libsvtav1", gop=16, bit_rate=None, options={"preset": "12", "crf": "20", "svtav1-params": "lp=1"})
    grain = {"preset": "12", "crf": "20", "svtav1-params": "lp=1:film-grain=25"}
    cases = [
        surgical("vp8-hidden.webm", "VP8 hidden frames", vp8, _hide(4), claims.hidden_vp8),
        surgical("vp8-hidden.mkv", "VP8 hidden frames", vp8, _hide(3), claims.hidden_vp8),
        surgical("vp8-hidden.avi", "VP8 hidden frames", vp8, _hide(4), claims.hidden_vp8),
        encoded("vp8-plain.webm", "VP8", vp8, claims.in_order),
        encoded("vp8-plain.ogv", "VP8", vp8),
        encoded("vp8-plain.avi", "VP8", vp8),
        encoded("vp9-plain.webm", "VP9", vp9),
        encoded("vp9-444.webm", "VP9", replace(vp9, pix_fmt="yuv444p"), claims.as_format("yuv444p")),
        encoded("vp9-lossless.mkv", "VP9", Video("libvpx-vp9", options=_FAST | {"lossless": "1"}, pix_fmt="gbrp")),
        encoded("av1.mkv", "AV1", av1, claims.hidden_av1),
        encoded("av1.mp4", "AV1", av1, claims.hidden_av1),
        encoded("av1.webm", "AV1", av1, claims.hidden_av1),
        encoded("av1-long-gop.mkv", "AV1", replace(av1, gop=300), claims.hidden_av1, claims.one_keyframe),
        encoded("av1-10-bit.mp4", "AV1", replace(av1, pix_fmt="yuv420p10le"), claims.as_format("yuv420p10le")),
        encoded("av1-film-grain.mkv", "AV1", replace(av1, options=grain)),
        encoded("av1-low-delay.mp4", "AV1", replace(av1, options=low_delay)),
    ]
    return cases


def _alone() -> list[Case]:
    kind = "frames that stand alone"
    plain = [
        ("mjpeg", "avi", "yuvj420p"),
        ("mjpeg", "mov", "yuvj422p"),
        ("mjpeg", "mkv", "yuvj444p"),
        ("prores_ks", "mov", "yuv422p10le"),
        ("ffv1", "avi", "yuv420p"),
        ("ffv1", "mkv", "bgr0"),
        ("huffyuv", "avi", "yuv422p"),
        ("ffvhuff", "avi", "yuv420p"),
        ("utvideo", "avi", "yuv420p"),
        ("magicyuv", "avi", "yuv444p"),
        ("rawvideo", "avi", "yuv420p"),
        ("rawvideo", "mov", "yuyv422"),
        ("png", "mov", "rgb24"),
        ("jpeg2000", "mov", "rgb24"),
        ("cfhd", "mov", "yuv422p10le"),
        ("v210", "mov", "yuv422p10le"),
        ("asv1", "avi", "yuv420p"),
    ]
    cases = [
        encoded(
            f"{codec}-{pix_fmt}.{suffix}",
            kind,
            Video(codec, pix_fmt=pix_fmt, gop=1, frames=20, bit_rate=None if codec != "mjpeg" else 3_000_000),
        )
        for codec, suffix, pix_fmt in plain
    ]
    dv = Video(
        "dvvideo",
        frames=10,
        size=(480, 720),
        pix_fmt="yuv411p",
        rate=Fraction(30000, 1001),
        time_base=Fraction(1001, 30000),
        gop=None,
        bit_rate=None,
    )
    cases += [
        encoded(f"dv.{suffix}", kind, dv, claims.pixels_not_square, pixel_aspect=8 / 9) for suffix in ("avi", "mov")
    ]
    return cases


def _older() -> list[Case]:
    kind = "other codecs with differences"
    some = [
        ("qtrle", "mov", "rgb24", {}),
        ("cinepak", "avi", "rgb24", {}),
        ("cinepak", "mov", "rgb24", {}),
        ("svq1", "mov", "yuv410p", {}),
        ("flashsv", "avi", "bgr24", {}),
        ("zmbv", "avi", "bgr0", {}),
        ("snow", "avi", "yuv420p", {}),
        ("flv", "avi", "yuv420p", {}),
        ("h263p", "avi", "yuv420p", {}),
        ("ffv1", "mkv", "yuv422p", {"context": "1"}),
        ("msvideo1", "avi", "rgb555le", {}),
    ]
    sizes = {"cinepak": (48, 80)}  # its encoder is slow
    cases = [
        encoded("h263.mov", kind, Video("h263", size=(96, 128), frames=30), pixel_aspect=12 / 11)
    ]  # a size and shape of H.263
    for codec, suffix, pix_fmt, options in some:
        video = Video(codec, pix_fmt=pix_fmt, options=options, frames=30, size=sizes.get(codec, (96, 160)))
        cases.append(encoded(f"ffv1-context.{suffix}" if codec == "ffv1" else f"{codec}.{suffix}", kind, video))
    return cases


def gif(times: list[int] | None = None, frames: int = 30) -> Video:
    """A GIF, whose times count hundredths of a second."""
    video = Video("gif", frames=frames, pix_fmt="rgb8", gop=None, bit_rate=None, rate=Fraction(20))
    if times is None:
        return replace(video, time_base=Fraction(1, 20))
    return replace(video, times=times, time_base=Fraction(1, 100))


def _gif() -> list[Case]:
    uneven = [0]
    for number in range(29):
        uneven.append(uneven[-1] + (4, 4, 20, 4, 50)[number % 5])
    return [
        encoded("steady.gif", "GIF", gif()),
        encoded("delays-vary.gif", "GIF", gif(uneven), claims.uneven_times),
        encoded("no-loop.gif", "GIF", gif(), loop="-1"),
        encoded("gray.gif", "GIF", replace(gif(), pix_fmt="gray"), claims.colorless),
        encoded("whole-frames.gif", "GIF", replace(gif(), options={"gifflags": "-offsetting-transdiff"})),
        encoded("fast.gif", "GIF", gif(list(range(30)))),
    ]


CASES = [*_windows_media(), *_web(), *_alone(), *_older(), *_gif()]
