"""Files that begin or end in the middle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.video import claims
from tests.video.cases import DAMAGED, Case
from tests.video.corpus_codecs import gif
from tests.video.corpus_h264 import FRAGMENTED, h264, hevc
from tests.video.corpus_mpeg import mpeg2, mpeg4
from tests.video.encoding import Video, encode, encoded_beside, read_chunks, remux, write, write_chunks
from tests.video.surgery import cut, pack_b_frames

_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2")
_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3")
_NO_B = h264("keyint=12:min-keyint=12:scenecut=0:bframes=0")
_REFRESH = h264("intra-refresh=1:keyint=12:scenecut=0:bframes=0")
_HEVC_OPEN = hevc("open-gop=1:keyint=12:min-keyint=12:bframes=3")
_HEVC_RECOVERY = "versions before 7.1 show HEVC pictures whose references are missing"


# ---- files that begin inside of a group of pictures ----


def _cut_case(name: str, video: Video, first: float, *wanted: claims.Claim, unit: int = 188, **rest: Any) -> Case:
    def make(path: Path) -> None:
        with encoded_beside(path, path.suffix[1:], replace(video, frames=60)) as source:
            cut(source, path, first, unit=unit)

    return Case(name, "cut at the start", make, claims=wanted, encoders=(video.codec,), **rest)


def _cut_at_start() -> list[Case]:
    inside = claims.starts_inside_a_group
    cases = []
    for number, share in enumerate((0.1, 0.37, 0.52)):
        cases += [
            _cut_case(f"cut-{number}-mpeg2-open-gop.ts", mpeg2(2), share, inside),
            _cut_case(f"cut-{number}-mpeg2-closed-gop.ts", mpeg2(2, flags="+cgop"), share, inside),
            _cut_case(f"cut-{number}-h264-closed-gop.ts", _CLOSED, share, inside),
            _cut_case(f"cut-{number}-h264-open-gop.ts", _OPEN, share, inside),
            _cut_case(f"cut-{number}-hevc-open-gop.ts", _HEVC_OPEN, share, inside, by_command=_HEVC_RECOVERY),
            _cut_case(f"cut-{number}-mpeg2-open-gop.mpg", mpeg2(2), share, unit=2048),
            _cut_case(f"cut-{number}-mpeg4.ts", mpeg4(2), share, inside),
        ]
    cases += [
        _cut_case("cut-3-h264-intra-refresh.ts", _REFRESH, 0.3),
        _cut_case("cut-4-mpeg1.mpg", mpeg2(2, "mpeg1video"), 0.3, unit=2048),
        _cut_case("cut-5-mpeg2-anywhere.mpg", mpeg2(2), 0.43, unit=1),
    ]
    return cases


def _begins(name: str, video: Video, first: int | str, *wanted: claims.Claim, **rest: Any) -> Case:
    """The case of packets from number ``first`` on, or from the second ``"keyframe"``, as recorders write them."""

    def make(path: Path) -> None:
        with encoded_beside(path, "mp4", video) as source:
            chunks, _ = read_chunks(source)
            start = [n for n, chunk in enumerate(chunks) if chunk.key][1] if isinstance(first, str) else first
            remux(source, path, lambda chunks: chunks[start:])

    return Case(name, "cut at the start", make, claims=wanted, encoders=(video.codec,), **rest)


def _without_header(path: Path) -> None:
    """The fragments of an mp4 without the header in front of them, as a player loads them one by one."""
    write(path, _CLOSED, **FRAGMENTED)
    data = path.read_bytes()
    path.write_bytes(data[data.index(b"moof") - 4 :])


def _recorded() -> list[Case]:
    inside = claims.starts_inside_a_group
    nothing = r"(?i)frame|decod|invalid|video|moov"
    point, cra = (claims.begins_without_idr, claims.reaches_back), (claims.begins_at_cra, claims.skipped_leading)
    return [
        _begins("begins-inside-h264.mkv", _CLOSED, 5, inside),
        _begins("begins-inside-h264.mp4", _CLOSED, 5, inside),
        # The leading pictures behind the first refer to what is not in the file.
        _begins("begins-at-recovery-point.mp4", _OPEN, "keyframe", *point),
        _begins("begins-at-recovery-point.mkv", _OPEN, "keyframe", *point),
        # The parameters that every picture needs came with the first keyframe alone.
        _begins("begins-without-parameters.ts", _OPEN, "keyframe", refusal=nothing),
        _begins("begins-at-cra.mp4", _HEVC_OPEN, "keyframe", *cra),
        _begins("begins-at-cra.mkv", _HEVC_OPEN, "keyframe", *cra),
        _begins("begins-at-cra.ts", _HEVC_OPEN, "keyframe", *cra),
        _begins("begins-inside-hevc.mp4", _HEVC_OPEN, 5, inside, by_command=_HEVC_RECOVERY),
        _begins("begins-inside-mpeg4.mp4", mpeg4(2), 4, inside),
        Case("begins-without-header.mp4", "cut at the start", _without_header, encoders=("libx264",), refusal=nothing),
        _begins("begins-inside-refresh.mkv", _REFRESH, 7),
    ]


# ---- files that end in the middle ----


def _short_case(name: str, video: Video, share: float, by_command: str = "", **options: str) -> Case:
    def make(path: Path) -> None:
        with encoded_beside(path, path.suffix[1:], video, **options) as source:
            cut(source, path, 0.0, share, unit=1)

    return Case(
        name,
        "cut off at the end",
        make,
        encoders=(video.codec,),
        may_refuse=DAMAGED,
        by_command=by_command,
    )


def _cut_at_end() -> list[Case]:
    vp8 = Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    first = {"movflags": "faststart"}
    return [
        _short_case("cut-off.mp4", _CLOSED, 0.6, **first),
        _short_case("cut-off-open-gop.mp4", _OPEN, 0.7, **first),
        _short_case("cut-off-hevc.mp4", _HEVC_OPEN, 0.7, **first),
        _short_case("cut-off-fragmented.mp4", _CLOSED, 0.6, **FRAGMENTED),
        _short_case("cut-off.mkv", _CLOSED, 0.6),
        _short_case("cut-off-open-gop.mkv", _OPEN, 0.6),
        _short_case("cut-off.avi", mpeg4(2), 0.6),
        _short_case("cut-off.ts", _CLOSED, 0.6),
        _short_case("cut-off.mpg", mpeg2(2), 0.6),
        _short_case("cut-off.webm", vp8, 0.6),
        _short_case("cut-off.wmv", Video("wmv2"), 0.6),
        _short_case(
            "cut-off.gif",
            gif(),
            0.6,
            by_command="versions differ in whether they show the part of a picture that is left",
        ),
        Case(
            "cut-off-packed.avi",
            "cut off at the end",
            _cut_off_packed,
            encoders=("mpeg4",),
            may_refuse=DAMAGED,
        ),
        Case(
            "cut-off-before-index.mp4",
            "cut off at the end",
            _cut_off_before_index,
            encoders=("libx264",),
            refusal=r"(?i)moov|index|invalid",
        ),
    ]


def _cut_off_packed(path: Path) -> None:
    video = replace(mpeg4(2), tag="XVID")
    write_chunks(path, video, pack_b_frames(encode(video)[0]))
    cut(path, path, 0.0, 0.6, unit=1)


def _cut_off_before_index(path: Path) -> None:
    write(path, _CLOSED)
    path.write_bytes(path.read_bytes()[:-200])


CASES = [*_cut_at_start(), *_recorded(), *_cut_at_end()]
