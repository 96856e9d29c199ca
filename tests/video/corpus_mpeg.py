"""MPEG-1, MPEG-2 and MPEG-4 part 2, with packed and unpacked B-frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from tests.video import claims
from tests.video.cases import DAMAGED, Case, encoded
from tests.video.encoding import Chunk, Video, encode, write_chunks
from tests.video.surgery import empty_chunks, empty_vop, pack_b_frames

STEADY = {"b_strategy": "0", "sc_threshold": "1000000000"}
"""The encoder takes as many B-frames as it is told, and no keyframes of its own accord."""


def mpeg4(b_frames: int = 0, frames: int = 40, gop: int = 12, **options: str) -> Video:
    """MPEG-4 part 2."""
    return Video("mpeg4", frames=frames, gop=gop, b_frames=b_frames, options=STEADY | options)


def surgical(
    name: str,
    kind: str,
    video: Video,
    change: Callable[[list[Chunk]], list[Chunk]],
    *wanted: claims.Claim,
    sound: bool = False,
) -> Case:
    """The case of a video whose packets are changed before they are written."""

    def make(path: Path) -> None:
        write_chunks(path, video, change(encode(video)[0]), sound=sound)

    return Case(name, kind, make, claims=wanted, encoders=(video.codec,))


def _xvid(b_frames: int, frames: int = 40, gop: int = 12, **options: str) -> Video:
    return replace(mpeg4(b_frames, frames, gop, **options), tag="XVID")


def _packed() -> list[Case]:
    kind, packed = "MPEG-4 packed B-frames", (claims.two_vops_in_a_packet, claims.empty_vops)
    whole = (*packed, claims.shows(range(40)))
    ntsc = replace(_xvid(2), rate=Fraction(30), time_base=Fraction(1, 30))
    return [
        *(surgical(f"packed-{b}b.avi", kind, _xvid(b), pack_b_frames, *whole) for b in (1, 2, 3)),
        # The last packet is one of two pictures, or a B-frame, where a file was cut.
        surgical("packed-1b-last.avi", kind, _xvid(1, 39), lambda chunks: pack_b_frames(chunks)[:-1], *packed),
        surgical("packed-2b-last.avi", kind, _xvid(2), lambda chunks: pack_b_frames(chunks)[:-2], *packed),
        surgical("packed-2b-last-b.avi", kind, _xvid(2), lambda chunks: pack_b_frames(chunks)[:-1], *packed),
        surgical("packed-without-mark.avi", kind, _xvid(2), lambda chunks: pack_b_frames(chunks, mark=False), *packed),
        surgical("packed-long-gop.avi", kind, _xvid(2, gop=300), pack_b_frames, *whole, claims.one_keyframe),
        surgical("packed-closed-gop.avi", kind, _xvid(2, flags="+cgop"), pack_b_frames, *whole),
        surgical("packed-2b.mkv", kind, _xvid(2), pack_b_frames, *whole),
        surgical("packed-two-frames.avi", kind, _xvid(1, 3), pack_b_frames, claims.two_vops_in_a_packet),
        surgical("packed-1b-sound.avi", kind, _xvid(1), pack_b_frames, *whole, sound=True),
        surgical("packed-2b-sound.avi", kind, _xvid(2), pack_b_frames, *whole, sound=True),
        surgical("packed-30-fps.avi", kind, ntsc, pack_b_frames, *whole),
        surgical("packed-divx.avi", kind, replace(mpeg4(1), tag="DX50"), pack_b_frames, *whole),
    ]


def _insert(every: int, content: Callable[[bytes], bytes]) -> Callable[[list[Chunk]], list[Chunk]]:
    """Puts a packet of ``content``, made from the one before, behind every so many packets."""

    def change(chunks: list[Chunk]) -> list[Chunk]:
        data: list[tuple[bytes, bool]] = []
        for number, chunk in enumerate(chunks):
            data.append((chunk.data, chunk.key))
            if number % every == every - 1:
                data.append((content(chunk.data), False))
        return [Chunk(packet, number, number, key) for number, (packet, key) in enumerate(data)]

    return change


def _one_byte(path: Path) -> None:
    """Packets of one byte, which no decoder takes, between the frames."""
    write_chunks(path, _xvid(0), _insert(4, lambda _: b"\x7f")(encode(_xvid(0))[0]))


def _without_bytes(video: Video) -> Callable[[Path], None]:
    """AVI with empty chunks, where a recorder dropped frames."""
    filler = b"\x7f" * 24

    def make(path: Path) -> None:
        write_chunks(path, video, _insert(4, lambda _: filler)(encode(video)[0]))
        empty_chunks(path, filler)

    return make


def _mpeg4() -> list[Case]:
    in_order = claims.shows(range(40))
    plain = Video("libx264", options={"x264-params": "keyint=12:min-keyint=12:bframes=2:scenecut=0"}, gop=None)
    cases = [
        encoded(f"mpeg4-{b}b.{suffix}", "MPEG-4", mpeg4(b), *([claims.b_vops] if b else []))
        for suffix in ("avi", "mp4", "mkv", "mov", "ts", "mpg")
        for b in (0, 1, 2)
    ]
    cases += [
        encoded("mpeg4-closed-gop.avi", "MPEG-4", mpeg4(2, flags="+cgop"), claims.b_vops),
        encoded("mpeg4-closed-gop.mp4", "MPEG-4", mpeg4(2, flags="+cgop"), claims.b_vops),
        encoded("mpeg4-long-gop.avi", "MPEG-4", mpeg4(2, gop=300), claims.one_keyframe),
        encoded("mpeg4-interlaced.avi", "MPEG-4", mpeg4(2, flags="+ildct+ilme"), claims.interlaced),
        encoded("mpeg4-qpel.avi", "MPEG-4", mpeg4(2, flags="+qpel+mv4+aic"), claims.b_vops),
        encoded("mpeg4-xvid.avi", "MPEG-4", _xvid(2), claims.b_vops),
        # Recorders of a fixed rate repeat a frame by an empty picture.
        surgical("mpeg4-repeats.avi", "MPEG-4", _xvid(0), _insert(3, empty_vop), claims.empty_vops, in_order),
        Case("mpeg4-no-bytes.avi", "MPEG-4", _without_bytes(_xvid(0)), (in_order,), encoders=("mpeg4",)),
        Case("mpeg4-2b-no-bytes.avi", "MPEG-4", _without_bytes(_xvid(2)), (in_order,), encoders=("mpeg4",)),
        Case("h264-no-bytes.avi", "H.264 closed-gop", _without_bytes(plain), (in_order,), encoders=("libx264",)),
        Case("mpeg4-no-content.avi", "MPEG-4", _one_byte, (in_order,), encoders=("mpeg4",), may_refuse=DAMAGED),
    ]
    return cases


def mpeg2(b_frames: int = 2, codec: str = "mpeg2video", gop: int = 12, **options: str) -> Video:
    """MPEG-1 or MPEG-2; groups are open unless ``flags`` say otherwise."""
    return Video(codec, gop=gop, b_frames=b_frames, options=STEADY | options)


def _mpeg2() -> list[Case]:
    cases = []
    for suffix in ("mpg", "ts", "mkv", "mp4", "avi"):
        kinds = {
            "open-gop": (mpeg2(2), claims.mpeg2_open),
            "closed-gop": (mpeg2(2, flags="+cgop"), claims.mpeg2_closed),
            "no-b": (mpeg2(0), claims.in_order),
            "intra": (mpeg2(0, gop=1), claims.in_order),
        }
        for name, (video, claim) in kinds.items():
            cases.append(encoded(f"mpeg2-{name}.{suffix}", f"MPEG-2 {name}", video, claim))
    fields = mpeg2(2, flags="+ildct+ilme", alternate_scan="1")
    cases += [
        encoded("mpeg2-dvd.mpg", "MPEG-2 open-gop", mpeg2(2), claims.mpeg2_open, format="dvd", sound=True),
        encoded("mpeg2-interlaced.mpg", "MPEG-2 interlaced", fields, claims.interlaced),
        encoded("mpeg2-interlaced.ts", "MPEG-2 interlaced", fields, claims.interlaced),
        encoded("mpeg2-422.ts", "MPEG-2 open-gop", replace(mpeg2(2), pix_fmt="yuv422p")),
        encoded("mpeg2-long-gop.mpg", "MPEG-2 open-gop", mpeg2(2, gop=300)),
        encoded("mpeg1-open-gop.mpg", "MPEG-1", mpeg2(2, "mpeg1video"), claims.mpeg2_open),
        encoded("mpeg1-closed-gop.mpeg", "MPEG-1", mpeg2(2, "mpeg1video", flags="+cgop"), claims.mpeg2_closed),
        encoded("mpeg1-no-b.mpg", "MPEG-1", mpeg2(0, "mpeg1video"), claims.in_order),
    ]
    return cases


CASES = [*_packed(), *_mpeg4(), *_mpeg2()]
