"""Time stamps that are repeated, missing, unsorted, far from zero or uneven: a frame's number is its place in order."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from tests.video import claims
from tests.video.cases import Case, encoded
from tests.video.corpus_h264 import h264
from tests.video.corpus_mpeg import mpeg2, mpeg4
from tests.video.encoding import Chunk, Video, encode, encoded_beside, remux, write, write_chunks

_CLOSED = "keyint=12:min-keyint=12:scenecut=0:bframes=2"
_NO_B = "keyint=12:min-keyint=12:scenecut=0:bframes=0"
MILLISECOND = Fraction(1, 1000)
TICK = 512
"""Units between two frames in the mp4 that times are changed in (12,800 a second at 25 frames)."""
Change = Callable[[list[Chunk]], list[Chunk]]


def _retimed(time: Callable[[int], int]) -> Change:
    """Frame ``i`` in order of presentation gets the time stamp ``time(i)``, late enough to come after its decoding."""

    def change(chunks: list[Chunk]) -> list[Chunk]:
        place = {pts: number for number, pts in enumerate(sorted(chunk.pts or 0 for chunk in chunks))}
        return [
            replace(chunk, pts=time(place[chunk.pts or 0]) + 4 * TICK, dts=number * TICK)
            for number, chunk in enumerate(chunks)
        ]

    return change


def _case(name: str, video: Video, change: Change, *wanted: claims.Claim, **options: str) -> Case:
    """The case of an H.264 file whose packets get other times."""

    def make(path: Path) -> None:
        with encoded_beside(path, "mp4", video, movflags="negative_cts_offsets") as source:
            remux(source, path, change, **options)

    # Where the second frame comes before the first, an mp4's edit list hides it.
    shown = () if name == "times-unsorted.mp4" else (claims.shows(range(video.frames)),)
    return Case(name, "times", make, claims=(*wanted, *shown), encoders=(video.codec,))


def _repeated(i: int) -> int:
    return TICK * (i - (i % 5 == 4))


def _swapped(i: int) -> int:
    return TICK * (i ^ 1)


def _decoding_times(chunks: list[Chunk]) -> list[Chunk]:
    """The order of decoding as time stamps, as muxers write that know of no B-frames."""
    return [replace(chunk, pts=TICK * number, dts=TICK * number) for number, chunk in enumerate(chunks)]


def _changed() -> list[Case]:
    closed, no_b = h264(_CLOSED), h264(_NO_B)
    cases = []
    for suffix in ("mkv", "mp4", "ts"):
        cases += [
            _case(f"times-repeated.{suffix}", no_b, _retimed(_repeated), claims.repeated_times),
            _case(f"times-repeated-b.{suffix}", closed, _retimed(_repeated), claims.repeated_times),
            _case(f"times-unsorted.{suffix}", no_b, _retimed(_swapped), claims.reordered),
            _case(f"times-of-decoding.{suffix}", closed, _decoding_times, claims.in_order),
            _case(f"times-late.{suffix}", closed, _later(TICK * 250), claims.late_start),
        ]
    negative = {"avoid_negative_ts": "disabled"}
    cases += [
        _case("times-early.ts", closed, _later(-TICK * 20), claims.early_start, output_ts_offset="-2.4", **negative),
        _case("times-early.wmv", closed, _later(-TICK * 20), claims.early_start, **negative),
        _case("times-early.mp4", closed, list, movflags="negative_cts_offsets", use_editlist="0", **negative),
        _case("times-missing.mkv", closed, _later(-TICK * 20), claims.lacks_times, **negative),
        _case("times-gap.mkv", closed, _gap(20, TICK * 25 * 3600), claims.uneven_times),
        _case("times-gap.mp4", closed, _gap(20, TICK * 25 * 3600), claims.uneven_times),
        # A transport stream's clock of 33 bits starts again after 26.5 hours, here in the middle of the video.
        _case("times-wrap.ts", closed, list, claims.early_start, output_ts_offset=_before_wrap(0.8)),
        _case("times-wrap-open-gop.ts", h264(f"{_CLOSED}:open-gop=1"), list, output_ts_offset=_before_wrap(0.5)),
    ]
    return cases


def _before_wrap(seconds: float) -> str:
    return f"{2**33 / 90000 - seconds:.6f}"


def _later(ticks: int) -> Change:
    return lambda chunks: [replace(c, pts=(c.pts or 0) + ticks, dts=(c.dts or 0) + ticks) for c in chunks]


def _gap(number: int, ticks: int) -> Change:
    """A pause in front of packet ``number``, which the times leave out."""

    def change(chunks: list[Chunk]) -> list[Chunk]:
        key = next(place for place, chunk in enumerate(chunks) if place >= number and chunk.key)
        return [*chunks[:key], *_later(ticks)(chunks[key:])]

    return change


def _uneven() -> list[Case]:
    recorder = [500 * i for i in range(8)] + [4000 + round(i * 1000 / 30) for i in range(32)]
    jitter = [40 * i + (0, 7, -9, 13, 2)[i % 5] for i in range(40)]
    cases = []
    for name, times in (("two-rates", recorder), ("jitter", jitter)):
        for suffix, video in (
            ("mkv", h264(_CLOSED)),
            ("mp4", h264(_CLOSED)),
            ("mov", h264(_NO_B)),
            ("ts", h264(_CLOSED)),
            ("webm", Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})),
        ):
            timed = replace(video, times=times, time_base=MILLISECOND)
            wanted = [claims.uneven_times] if name == "two-rates" else []
            cases.append(encoded(f"vfr-{name}.{suffix}", "variable rate", timed, *wanted))
    cases.append(
        encoded(
            "vfr-two-rates.wmv",
            "variable rate",
            Video("wmv2", times=recorder, time_base=MILLISECOND, rate=Fraction(1000)),
            claims.uneven_times,
        )
    )
    return cases


def _rates() -> list[Case]:
    kind, cases = "unusual rates", []
    for name, rate in (
        ("240", Fraction(240)),
        ("2400", Fraction(2400)),
        ("29.97", Fraction(30000, 1001)),
        ("1", Fraction(1)),
    ):
        for suffix in ("mp4", "mkv"):
            video = replace(h264(_CLOSED), rate=rate, time_base=1 / rate)
            # Matroska counts milliseconds, so frames of more than a thousand a second share them.
            wanted = [claims.repeated_times] if (name, suffix) == ("2400", "mkv") else []
            cases.append(encoded(f"rate-{name}.{suffix}", kind, video, *wanted))
    return cases


def _same_time(path: Path) -> None:
    """All frames of an mp4 at one time: their durations are zero."""
    write(path, h264(_NO_B))
    data = bytearray(path.read_bytes())
    at = data.index(b"stts")
    count, frames, _ = struct.unpack(">III", data[at + 8 : at + 20])
    if (count, frames) != (1, 40):
        raise ValueError(f"{path}: got {count} kinds of durations of {frames} frames, expected 1 of 40")
    data[at + 16 : at + 20] = struct.pack(">I", 0)
    path.write_bytes(data)


def _twice(suffix: str, video: Video) -> Callable[[Path], None]:
    """Two recordings in one file, one behind the other, each with times from its own start."""

    def make(path: Path) -> None:
        parts = []
        for seed in (0, 1):
            with encoded_beside(path, suffix, replace(video, seed=seed, frames=30)) as part:
                parts.append(part.read_bytes())
        path.write_bytes(b"".join(parts))

    return make


def _joined() -> list[Case]:
    open_gop = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"
    kind, back = "joined files", (claims.times_jump_back, claims.shows([*range(30), *range(30)]))
    return [
        Case("joined-mpeg2.ts", kind, _twice("ts", mpeg2(2)), back, encoders=("mpeg2video",)),
        Case("joined-mpeg2.mpg", kind, _twice("mpg", mpeg2(2)), back, encoders=("mpeg2video",)),
        Case("joined-h264.ts", kind, _twice("ts", h264(_CLOSED)), back, encoders=("libx264",)),
        Case("joined-h264-open-gop.ts", kind, _twice("ts", h264(open_gop)), back, encoders=("libx264",)),
        Case("joined-mpeg4.ts", kind, _twice("ts", mpeg4(2)), back, encoders=("mpeg4",)),
    ]


def _elementary() -> list[Case]:
    """Streams without a container, under the names that people give them; no packet has a time."""
    kind = "no container"
    open_gop = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2"
    return [
        encoded("elementary-h264.mp4", kind, h264(_CLOSED), claims.lacks_times, format="h264"),
        encoded("elementary-h264-open-gop.mp4", kind, h264(open_gop), claims.lacks_times, format="h264"),
        encoded("elementary-h264-no-b.ts", kind, h264(_NO_B), claims.lacks_times, format="h264"),
        encoded("elementary-mpeg2.mpg", kind, mpeg2(2), claims.mpeg2_open, format="mpeg2video"),
        encoded("elementary-mpeg1.mpg", kind, mpeg2(2, "mpeg1video"), claims.mpeg2_open, format="mpeg1video"),
        Case(
            "elementary-mpeg4.m4v",
            kind,
            lambda path: write_chunks(path, mpeg4(2), encode(mpeg4(2))[0], "m4v"),
            (claims.b_vops,),
            encoders=("mpeg4",),
        ),
        encoded("matroska-in-disguise.mp4", kind, h264(open_gop), claims.keyframes_that_are_no_idr, format="matroska"),
        encoded("flash-in-disguise.mp4", kind, h264(open_gop), claims.keyframes_that_are_no_idr, format="flv"),
        encoded("avi-in-disguise.mp4", kind, mpeg4(2), claims.b_vops, format="avi"),
    ]


CASES = [
    *_changed(),
    *_uneven(),
    *_rates(),
    *_joined(),
    *_elementary(),
    Case("times-equal.mp4", "times", _same_time, (claims.repeated_times,), encoders=("libx264",)),
]
