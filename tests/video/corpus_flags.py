"""Containers that say wrongly, or do not say, where their keyframes are, and streams that do not say it either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.video import claims
from tests.video.cases import DAMAGED, Case, encoded
from tests.video.claims import nal_units
from tests.video.corpus_h264 import h264
from tests.video.corpus_mpeg import mpeg2, mpeg4, surgical
from tests.video.encoding import Chunk, Video, encoded_beside, remux, write

_KIND = "wrong or no marks of keyframes"
_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2")
_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2")
_VP8 = Video("libvpx", options={"deadline": "realtime", "cpu-used": "8"})
_SHOWN = claims.shows(range(40))


def _all_keyframes(chunks: list[Chunk]) -> list[Chunk]:
    return [replace(chunk, key=True) for chunk in chunks]


def _one_keyframe(chunks: list[Chunk]) -> list[Chunk]:
    return [replace(chunk, key=number == 0) for number, chunk in enumerate(chunks)]


def _shifted_keyframes(chunks: list[Chunk]) -> list[Chunk]:
    """The mark of every keyframe at the packet behind it."""
    marks = [True, *(chunk.key for chunk in chunks[:-1])]
    return [replace(chunk, key=mark) for chunk, mark in zip(chunks, marks)]


def _without_messages(chunks: list[Chunk]) -> list[Chunk]:
    """H.264 without the messages that tell where a decoder may start; lengths of four bytes stand before units."""
    kept = [[unit for unit in nal_units(chunk.data) if unit[0] & 31 != 6] for chunk in chunks]
    data = [b"".join(len(unit).to_bytes(4, "big") + unit for unit in units) for units in kept]
    return [replace(chunk, data=content) for chunk, content in zip(chunks, data)]


def _changed(name: str, video: Video, change: Callable[[list[Chunk]], list[Chunk]], *wanted: claims.Claim) -> Case:
    def make(path: Path) -> None:
        with encoded_beside(path, "mp4", video) as source:
            remux(source, path, change)

    return Case(name, _KIND, make, claims=(*wanted, _SHOWN), encoders=(video.codec,))


def _without_sync_table(path: Path) -> None:
    """An mp4 that does not list its keyframes, which means that every frame is one."""
    write(path, _CLOSED)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))


def _marked() -> list[Case]:
    lie, xvid = claims.marks_lie, replace(mpeg4(2), tag="XVID")
    silent, no_idr = claims.no_messages, claims.intra_without_idr
    refresh = h264("intra-refresh=1:keyint=12:scenecut=0:bframes=0")
    return [
        Case("flags-no-table.mp4", _KIND, _without_sync_table, (lie, _SHOWN), encoders=("libx264",)),
        _changed("flags-all.mp4", _OPEN, _all_keyframes, lie),
        _changed("flags-all.mkv", _CLOSED, _all_keyframes, lie),
        _changed("flags-all-mpeg4.mp4", mpeg4(2), _all_keyframes, lie),
        _changed("flags-one.mp4", _CLOSED, _one_keyframe, lie),
        _changed("flags-one.mkv", _OPEN, _one_keyframe, lie),
        _changed("flags-shifted.mp4", _CLOSED, _shifted_keyframes, lie),
        _changed("flags-shifted.mkv", _OPEN, _shifted_keyframes, lie),
        surgical("flags-all.avi", _KIND, xvid, _all_keyframes, lie, _SHOWN),
        surgical("flags-one.avi", _KIND, xvid, _one_keyframe, lie, _SHOWN),
        surgical("flags-all.webm", _KIND, _VP8, _all_keyframes, lie, _SHOWN),
        surgical("flags-shifted.webm", _KIND, _VP8, _shifted_keyframes, lie, _SHOWN),
        surgical("flags-all.wmv", _KIND, Video("wmv2"), _all_keyframes, lie, _SHOWN),
        _changed("no-messages-open-gop.mp4", _OPEN, _without_messages, silent, no_idr),
        _changed("no-messages-open-gop.mkv", _OPEN, _without_messages, silent, no_idr),
        _changed("no-messages-open-gop.ts", _OPEN, _without_messages, silent, no_idr),
        _changed("no-messages-refresh.mp4", refresh, _without_messages, silent, claims.one_idr),
    ]


def _without_index() -> list[Case]:
    kind = "no index"
    return [
        encoded("no-index.mkv", kind, _OPEN, live="1"),
        encoded("no-index.webm", kind, _VP8, live="1"),
        encoded("no-index-fragmented.mp4", kind, _OPEN, movflags="frag_every_frame+empty_moov"),
        encoded("no-index-default-base.mp4", kind, _OPEN, movflags="frag_keyframe+empty_moov+default_base_moof"),
        encoded("no-index-dash.mp4", kind, _OPEN, movflags="dash+frag_keyframe+empty_moov"),
        Case("no-index.avi", kind, _avi_without_index, (_SHOWN,), encoders=("mpeg4",)),
        # FFmpeg reads such a file by its list, from wrong places, and finds damage there.
        Case("index-wrong.avi", "wrong index", _wrong_index, encoders=("mpeg4",), may_refuse=DAMAGED),
        Case("index-half.avi", "wrong index", _half_an_index, (_SHOWN,), encoders=("mpeg4",)),
        encoded("packets-of-192.ts", kind, mpeg2(2), mpegts_m2ts_mode="1"),
    ]


def _avi_without_index(path: Path) -> None:
    """An AVI as a program leaves it that ends before it has written the list of frames."""
    write(path, mpeg4(2))
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"idx1")])


def _wrong_index(path: Path) -> None:
    """An AVI whose list of frames tells the places of the frames in the wrong order."""
    write(path, mpeg4(2))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"idx1") + 8
    entries = [data[place : place + 16] for place in range(at, at + 16 * 40, 16)]
    places = [entry[8:] for entry in entries]
    for number, (entry, place) in enumerate(zip(entries, [*places[5:], *places[:5]])):
        data[at + 16 * number : at + 16 * number + 16] = entry[:8] + place
    path.write_bytes(data)


def _half_an_index(path: Path) -> None:
    """An AVI that lists the first half of its frames."""
    write(path, mpeg4(2))
    data = path.read_bytes()
    at = data.rindex(b"idx1")
    path.write_bytes(data[: at + 4] + (16 * 20).to_bytes(4, "little") + data[at + 8 : at + 8 + 16 * 20])


# ---- files without pictures ----


def _bytes(content: bytes) -> Callable[[Path], None]:
    return lambda path: _write(path, content)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _sound_alone(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        out.mux([*stream.encode(frame), *stream.encode(None)])


def _no_pictures() -> list[Case]:
    kind, reason = "no video", r"(?i)video|invalid|empty|stream|format|decod|end of file"
    return [
        Case("empty.mp4", kind, _bytes(b""), refusal=reason),
        Case("empty.avi", kind, _bytes(b""), refusal=reason),
        Case("text.mkv", kind, _bytes(b"A letter, and no video.\n" * 40), refusal=reason),
        Case("zeros.ts", kind, _bytes(bytes(188 * 40)), refusal=reason),
        Case("bytes.webm", kind, _bytes(bytes(range(256)) * 30), refusal=reason),
        Case("sound-alone.mp4", kind, _sound_alone, refusal=r"(?i)no video"),
        Case("header-alone.avi", kind, _header_alone, refusal=reason),
    ]


def _header_alone(path: Path) -> None:
    write(path, mpeg4(0))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"movi") + 4])


CASES = [*_marked(), *_without_index(), *_no_pictures()]
