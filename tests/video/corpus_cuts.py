"""Files that begin or end in the middle, edit lists, damage, and pictures that change their size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.video import claims
from tests.video.cases import Case
from tests.video.corpus_codecs import gif
from tests.video.corpus_h264 import FRAGMENTED, h264, hevc
from tests.video.corpus_mpeg import mpeg2, mpeg4
from tests.video.encoding import Chunk, Video, encode, read_chunks, remux, write, write_chunks
from tests.video.surgery import cut, damage, flipped, pack_b_frames, set_edit_list, shortened, zeroed

_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2")
_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3")
_NO_B = h264("keyint=12:min-keyint=12:scenecut=0:bframes=0")
_REFRESH = h264("intra-refresh=1:keyint=12:scenecut=0:bframes=0")
_HEVC_OPEN = hevc("open-gop=1:keyint=12:min-keyint=12:bframes=3")
_HEVC_RECOVERY = "versions before 7.1 show HEVC pictures whose references are missing"
_CONCEALED = "versions fill in the missing part of a damaged picture with other contents"
_DAMAGED = r"(?i)damage|corrupt|invalid|decod|error|broken|lost|missing|differ"


def _from(path: Path, suffix: str, video: Video, **options: str) -> Path:
    """An undamaged file beside ``path``."""
    plain = path.with_suffix(f".plain.{suffix}")
    write(plain, video, **options)
    return plain


# ---- files that begin inside of a group of pictures ----


def _cut_case(name: str, video: Video, first: float, *wanted: claims.Claim, unit: int = 188, **rest: Any) -> Case:
    def make(path: Path) -> None:
        plain = _from(path, path.suffix[1:], replace(video, frames=60))
        cut(plain, path, first, unit=unit)
        plain.unlink()

    return Case(name, "cut at the start", make, claims=wanted, encoders=(video.codec,), **rest)


def _cut_at_start() -> list[Case]:
    inside = claims.starts_inside_a_group
    cases = []
    for number, share in enumerate((0.1, 0.37, 0.52)):
        cases += [
            _cut_case(f"cut-{number}-mpeg2-open-gop.ts", mpeg2(2), share, inside, hard=number == 1),
            _cut_case(f"cut-{number}-mpeg2-closed-gop.ts", mpeg2(2, flags="+cgop"), share, inside),
            _cut_case(f"cut-{number}-h264-closed-gop.ts", _CLOSED, share, inside, hard=number == 1),
            _cut_case(f"cut-{number}-h264-open-gop.ts", _OPEN, share, inside, hard=number == 1),
            _cut_case(f"cut-{number}-hevc-open-gop.ts", _HEVC_OPEN, share, inside, hard=number == 1, by_command=_HEVC_RECOVERY),
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
        plain = _from(path, "mp4", video)
        chunks, _ = read_chunks(plain)
        start = [n for n, chunk in enumerate(chunks) if chunk.key][1] if isinstance(first, str) else first
        remux(plain, path, lambda chunks: chunks[start:])
        plain.unlink()

    return Case(name, "cut at the start", make, claims=wanted, encoders=(video.codec,), **rest)


def _recorded() -> list[Case]:
    inside = claims.starts_inside_a_group
    point, cra = (claims.begins_without_idr, claims.reaches_back), (claims.begins_at_cra, claims.skipped_leading)
    return [
        _begins("begins-inside-h264.mkv", _CLOSED, 5, inside),
        _begins("begins-inside-h264.mp4", _CLOSED, 5, inside),
        # The leading pictures behind the first refer to what is not in the file.
        _begins("begins-at-recovery-point.mp4", _OPEN, "keyframe", *point),
        _begins("begins-at-recovery-point.mkv", _OPEN, "keyframe", *point),
        # The parameters that every picture needs came with the first keyframe alone.
        _begins("begins-without-parameters.ts", _OPEN, "keyframe", refusal=r"(?i)frame|decod|invalid|video"),
        _begins("begins-at-cra.mp4", _HEVC_OPEN, "keyframe", *cra, hard=True),
        _begins("begins-at-cra.mkv", _HEVC_OPEN, "keyframe", *cra),
        _begins("begins-at-cra.ts", _HEVC_OPEN, "keyframe", *cra),
        _begins("begins-inside-hevc.mp4", _HEVC_OPEN, 5, inside, by_command=_HEVC_RECOVERY),
        _begins("begins-inside-mpeg4.mp4", mpeg4(2), 4, inside),
        _begins("begins-inside-refresh.mkv", _REFRESH, 7),
    ]


# ---- edit lists ----


def _copied(name: str, video: Video, start: int, hard: bool = False) -> Case:
    """The case of a copy from frame ``start`` on: it holds the packets from the keyframe before and hides some."""

    def make(path: Path) -> None:
        plain = _from(path, "mp4", video)
        chunks, _ = read_chunks(plain)
        wanted = sorted(chunk.pts or 0 for chunk in chunks)[start]
        key = max(n for n, chunk in enumerate(chunks) if chunk.key and (chunk.pts or 0) <= wanted)

        def shift(chunks: list[Chunk]) -> list[Chunk]:
            return [replace(c, pts=(c.pts or 0) - wanted, dts=(c.dts or 0) - wanted) for c in chunks[key:]]

        remux(plain, path, shift)
        plain.unlink()

    return Case(name, "edit lists", make, claims=(claims.edited,), encoders=(video.codec,), hard=hard)


def _edits(name: str, video: Video, edits: list[tuple[int, int]], *wanted: claims.Claim, hard: bool = False) -> Case:
    """The case of a list of pieces, given as (number of frames, first frame), -1 for a pause."""

    def make(path: Path) -> None:
        write(path, video)
        delay = 512 * (2 if video.b_frames != 0 and "bframes=0" not in str(video.options) else 0)
        pieces = [(frames * 40, first if first < 0 else 512 * first + delay) for frames, first in edits]
        set_edit_list(path, pieces)

    return Case(name, "edit lists", make, claims=wanted, encoders=(video.codec,), hard=hard)


def _edit_lists() -> list[Case]:
    return [
        _copied("copied-closed-gop.mp4", _CLOSED, 18, hard=True),
        _copied("copied-closed-gop.mov", _CLOSED, 18),
        _copied("copied-open-gop.mp4", _OPEN, 18, hard=True),
        _copied("copied-no-b.mp4", _NO_B, 17),
        _copied("copied-hevc.mp4", _HEVC_OPEN, 18),
        _copied("copied-refresh.mp4", _REFRESH, 18),
        _copied("copied-mpeg4.mp4", mpeg4(2), 18),
        _edits("edit-trims-start.mp4", _CLOSED, [(30, 5)], claims.edited),
        _edits("edit-trims-both.mp4", _CLOSED, [(20, 5)], claims.edited, hard=True),
        _edits("edit-trims-end.mp4", _NO_B, [(25, 0)]),
        _edits("edit-pause.mp4", _CLOSED, [(25, -1), (40, 0)], claims.edited),
        _edits("edit-two-pieces.mp4", _CLOSED, [(10, 0), (10, 20)], claims.edited),
        _edits("edit-piece-twice.mp4", _NO_B, [(10, 5), (10, 5)], claims.edited),
        _edits("edit-backwards.mp4", _NO_B, [(10, 20), (10, 0)], claims.edited),
        _edits("edit-open-gop.mp4", _OPEN, [(25, 13)], claims.edited),
    ]


# ---- files that end in the middle ----


def _short_case(name: str, video: Video, share: float, by_command: str = "", **options: str) -> Case:
    def make(path: Path) -> None:
        plain = _from(path, path.suffix[1:], video, **options)
        cut(plain, path, 0.0, share, unit=1)
        plain.unlink()

    return Case(
        name,
        "cut off at the end",
        make,
        encoders=(video.codec,),
        may_refuse=_DAMAGED,
        by_command=by_command,
        hard=name == "cut-off.mp4",
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
        _short_case("cut-off.gif", gif(), 0.6, by_command="versions differ in whether they show the part of a picture that is left"),
        Case(
            "cut-off-packed.avi",
            "cut off at the end",
            _cut_off_packed,
            encoders=("mpeg4",),
            may_refuse=_DAMAGED,
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
    plain = path.with_suffix(".plain.avi")
    write_chunks(plain, video, pack_b_frames(encode(video)[0]))
    cut(plain, path, 0.0, 0.6, unit=1)
    plain.unlink()


def _cut_off_before_index(path: Path) -> None:
    write(path, _CLOSED)
    path.write_bytes(path.read_bytes()[:-200])


# ---- damage ----


def _damaged(name: str, video: Video, number: int, change: Callable[[bytes], bytes], **rest: Any) -> Case:
    """The case of one packet whose content is changed."""

    def make(path: Path) -> None:
        plain = _from(path, path.suffix[1:], video)
        remux(plain, path, lambda chunks: damage(chunks, number, change))
        plain.unlink()

    return Case(name, "damage", make, encoders=(video.codec,), may_refuse=_DAMAGED, **rest)


def _dropped(name: str, video: Video, number: int, hard: bool = False) -> Case:
    """The case of one packet that is missing."""

    def make(path: Path) -> None:
        plain = _from(path, path.suffix[1:], video)
        remux(plain, path, lambda chunks: chunks[:number] + chunks[number + 1 :])
        plain.unlink()

    return Case(name, "damage", make, encoders=(video.codec,), may_refuse=_DAMAGED, hard=hard)


def _lost_packets(name: str, video: Video, number: int, count: int = 1) -> Case:
    """The case of a transport stream without some of its packets of 188 bytes."""

    def make(path: Path) -> None:
        write(path, video)
        data = path.read_bytes()
        path.write_bytes(data[: 188 * number] + data[188 * (number + count) :])

    return Case(name, "damage", make, encoders=(video.codec,), may_refuse=_DAMAGED)


def _damage() -> list[Case]:
    vp8 = Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    vp9 = Video("libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"})
    wmv2, mjpeg = Video("wmv2"), Video("mjpeg", pix_fmt="yuvj420p", gop=1, bit_rate=3_000_000)
    return [
        _damaged("damage-flipped.mp4", _CLOSED, 17, flipped, hard=True),
        _damaged("damage-keyframe.mp4", _CLOSED, 12, flipped),
        _damaged("damage-zeroed.mkv", _OPEN, 17, zeroed),
        _damaged("damage-shortened.mp4", _NO_B, 18, shortened),
        _damaged("damage-flipped.avi", mpeg4(2), 16, flipped),
        _damaged("damage-shortened.avi", mpeg4(0), 16, shortened),
        _damaged("damage-flipped.ts", _CLOSED, 17, flipped),
        _damaged("damage-mpeg2.mpg", mpeg2(2), 17, flipped),
        _damaged("damage-mpeg2.ts", mpeg2(2), 12, zeroed),
        _damaged("damage-hevc.mp4", _HEVC_OPEN, 17, flipped),
        _damaged("damage-vp8.webm", vp8, 17, shortened, by_command=_CONCEALED),
        _damaged("damage-vp9.webm", vp9, 17, flipped),
        _damaged("damage-mjpeg.avi", mjpeg, 17, shortened, by_command=_CONCEALED),
        _damaged("damage-mjpeg-no-picture.avi", mjpeg, 17, lambda data: bytes(len(data))),
        _damaged("damage-wmv2.wmv", wmv2, 17, flipped),
        _dropped("damage-dropped.mp4", _NO_B, 17, hard=True),
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


def _sizes() -> list[Case]:
    vp8 = Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    mjpeg = Video("mjpeg", pix_fmt="yuvj420p", gop=1, bit_rate=3_000_000)
    files = [
        ("sizes-change-h264.ts", "ts", _CLOSED),
        ("sizes-change-mpeg2.ts", "ts", mpeg2(2)),
        ("sizes-change-vp8.webm", "webm", vp8),
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
            hard=name.endswith("h264.ts"),
        )
        for name, container, video in files
    ]


CASES = [*_cut_at_start(), *_recorded(), *_edit_lists(), *_cut_at_end(), *_damage(), *_sizes()]
