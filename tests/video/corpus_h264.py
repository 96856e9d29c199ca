"""H.264 and HEVC: every kind of keyframe, in every container."""

from __future__ import annotations

from dataclasses import replace

from tests.video import claims
from tests.video.cases import Case, encoded
from tests.video.encoding import Video

CONTAINERS = ("mp4", "fragmented.mp4", "mkv", "avi", "ts")
LIKE_MP4 = ("mov", "m4v")
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}
# AVI has no times of its own, so no claim about them can be checked there.
_H264 = {
    "closed-gop": ("keyint=12:min-keyint=12:scenecut=0:bframes=3", (claims.idr_only, claims.closed)),
    "open-gop": ("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3", (claims.keyframes_that_are_no_idr,)),
    "open-gop-one-b": (
        "open-gop=1:keyint=8:min-keyint=8:scenecut=0:bframes=1:b-adapt=0",
        (claims.keyframes_that_are_no_idr,),
    ),
    "intra-refresh": ("intra-refresh=1:keyint=12:scenecut=0:bframes=0", (claims.slices_that_refresh,)),
    "intra-refresh-b": ("intra-refresh=1:keyint=12:scenecut=0:bframes=2:b-adapt=0", (claims.slices_that_refresh,)),
    "long-gop": ("keyint=infinite:scenecut=0:bframes=3", (claims.one_idr,)),
    "all-intra": ("keyint=1", (claims.all_keyframes,)),
    "b-pyramid": (
        "keyint=16:min-keyint=16:scenecut=0:bframes=7:b-pyramid=normal:b-adapt=0:ref=6",
        (claims.idr_only,),
    ),
    "b-pyramid-open-gop": (
        "open-gop=1:keyint=16:min-keyint=16:scenecut=0:bframes=5:b-pyramid=strict:b-adapt=0",
        (claims.keyframes_that_are_no_idr,),
    ),
    "no-b": ("keyint=12:min-keyint=12:scenecut=0:bframes=0", (claims.idr_only, claims.in_order)),
}


def h264(parameters: str, **changes: object) -> Video:
    """H.264 with x264's parameters."""
    video = Video("libx264", gop=None, bit_rate=None, options={"x264-params": f"{parameters}:crf=18:threads=1"})
    return replace(video, **changes)


def hevc(parameters: str, **changes: object) -> Video:
    """HEVC with x265's parameters."""
    quiet = "crf=18:log-level=none:pools=none:frame-threads=1:scenecut=0"
    video = Video("libx265", gop=None, bit_rate=None, options={"x265-params": f"{parameters}:{quiet}"})
    return replace(video, **changes)


def _h264_in_containers() -> list[Case]:
    cases = []
    for gop, (parameters, wanted) in _H264.items():
        for container in (*CONTAINERS, *(LIKE_MP4 if gop in ("closed-gop", "open-gop") else ())):
            name = f"h264-{gop}.{container}"
            options = FRAGMENTED if container == "fragmented.mp4" else {}
            claimed = [] if container in ("avi", "ts") and gop.startswith("intra-refresh") else wanted
            claimed = [c for c in claimed if container != "avi" or c not in (claims.closed, claims.in_order)]
            cases.append(encoded(name, f"H.264 {gop}", h264(parameters), *claimed, **options))
    return cases


def _h264_pictures() -> list[Case]:
    gop = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"
    formats = {
        "10-bit": "yuv420p10le",
        "422": "yuv422p",
        "444": "yuv444p",
        "422-10-bit": "yuv422p10le",
        "gray": "gray",
        "full-range": "yuvj420p",
        "gray-10-bit": "gray10le",
    }
    cases = [
        encoded(
            f"h264-{name}.{suffix}",
            "H.264 pixel formats",
            h264(gop, pix_fmt=format),
            claims.colorless if "gray" in format else claims.as_format(format),
        )
        for name, format in formats.items()
        for suffix in ("mp4", "mkv")
    ]
    rgb = replace(h264(gop), codec="libx264rgb", pix_fmt="rgb24")
    cases += [encoded(f"h264-rgb.{s}", "H.264 pixel formats", rgb, claims.as_format("gbrp")) for s in ("mp4", "mkv")]
    fields = h264(f"{gop}:interlaced=1:tff=1")
    cases += [
        encoded(f"h264-interlaced.{s}", "H.264 interlaced", fields, claims.interlaced) for s in ("mp4", "mkv", "ts")
    ]
    fake = h264(f"{gop}:fake-interlaced=1")
    cases.append(encoded("h264-fake-interlaced.mp4", "H.264 interlaced", fake))
    cases.append(encoded("h264-lossless.mp4", "H.264 pixel formats", h264(f"{gop}:qp=0", pix_fmt="yuv444p")))
    cases.append(encoded("h264-slices.mp4", "H.264 open-gop", h264(f"{gop}:slices=4:cabac=0"), claims.reaches_back))
    return cases


_HEVC = {
    "closed-gop": ("open-gop=0:keyint=12:min-keyint=12:bframes=3", (claims.closed,)),
    "open-gop": ("open-gop=1:keyint=12:min-keyint=12:bframes=3", (claims.clean_random_access, claims.skipped_leading)),
    "long-gop": ("keyint=-1:bframes=3", (claims.one_keyframe,)),
    "all-intra": ("keyint=1", (claims.all_keyframes,)),
    "intra-refresh": ("intra-refresh=1:keyint=12:bframes=0", ()),
}


def _hevc_cases() -> list[Case]:
    cases = []
    for gop, (parameters, wanted) in _HEVC.items():
        for container in ("mp4", "fragmented.mp4", "mkv", "ts", "mov"):
            options = FRAGMENTED if container == "fragmented.mp4" else {}
            name = f"hevc-{gop}.{container}"
            cases.append(encoded(name, f"HEVC {gop}", hevc(parameters), *wanted, **options))
    deep = hevc("open-gop=1:keyint=12:min-keyint=12:bframes=3", pix_fmt="yuv420p10le")
    cases.append(encoded("hevc-10-bit.mp4", "HEVC pixel formats", deep, claims.as_format("yuv420p10le")))
    tagged = hevc("open-gop=1:keyint=12:min-keyint=12:bframes=3", tag="hvc1")
    cases.append(encoded("hevc-hvc1.mp4", "HEVC open-gop", tagged, claims.clean_random_access))
    full = hevc("open-gop=1:keyint=12:min-keyint=12:bframes=3", pix_fmt="yuv444p")
    cases.append(encoded("hevc-444.mkv", "HEVC pixel formats", full, claims.as_format("yuv444p")))
    return cases


CASES = [*_h264_in_containers(), *_h264_pictures(), *_hevc_cases()]
