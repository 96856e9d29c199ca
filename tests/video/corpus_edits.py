"""Edit lists of mp4 and mov, which hide frames, pause, repeat or reorder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.video import claims
from tests.video.cases import Case
from tests.video.corpus_h264 import h264, hevc
from tests.video.corpus_mpeg import mpeg4
from tests.video.encoding import Chunk, Video, encoded_beside, read_chunks, remux, write
from tests.video.surgery import set_edit_list

_CLOSED = h264("keyint=12:min-keyint=12:scenecut=0:bframes=2")
_OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3")
_NO_B = h264("keyint=12:min-keyint=12:scenecut=0:bframes=0")
_HEVC_OPEN = hevc("open-gop=1:keyint=12:min-keyint=12:bframes=3")
_REFRESH = h264("intra-refresh=1:keyint=12:scenecut=0:bframes=0")


def _copied(name: str, video: Video, start: int, late: int = 0) -> Case:
    """The case of a copy from frame ``start`` on: it holds the packets from the keyframe before and hides some.

    ``late`` frames more are not shown, since they refer to what is not in the file.
    """

    def make(path: Path) -> None:
        with encoded_beside(path, "mp4", video) as source:
            chunks, _ = read_chunks(source)
            wanted = sorted(chunk.pts or 0 for chunk in chunks)[start]
            key = max(n for n, chunk in enumerate(chunks) if chunk.key and (chunk.pts or 0) <= wanted)

            def shift(chunks: list[Chunk]) -> list[Chunk]:
                return [replace(c, pts=(c.pts or 0) - wanted, dts=(c.dts or 0) - wanted) for c in chunks[key:]]

            remux(source, path, shift)

    shown = claims.shows(range(start + late, video.frames))
    return Case(name, "edit lists", make, claims=(claims.edited, shown), encoders=(video.codec,))


def _edits(name: str, video: Video, edits: list[tuple[int, int]]) -> Case:
    """The case of a list of pieces, given as (number of frames, first frame), -1 for a pause."""

    def make(path: Path) -> None:
        write(path, video)
        # The movie counts milliseconds, the track 12,800 units a second, both at 25 frames.
        set_edit_list(path, [(frames * 40, first if first < 0 else 512 * first) for frames, first in edits])

    shown = [first + i for frames, first in edits if first >= 0 for i in range(frames)]
    return Case(name, "edit lists", make, claims=(claims.shows(shown),), encoders=(video.codec,))


def _edit_lists() -> list[Case]:
    return [
        _copied("copied-closed-gop.mp4", _CLOSED, 18),
        _copied("copied-closed-gop.mov", _CLOSED, 18),
        _copied("copied-open-gop.mp4", _OPEN, 18),
        _copied("copied-no-b.mp4", _NO_B, 17),
        _copied("copied-hevc.mp4", _HEVC_OPEN, 18),
        _copied("copied-refresh.mp4", _REFRESH, 18, late=2),
        _copied("copied-mpeg4.mp4", mpeg4(2), 18),
        _edits("edit-trims-start.mp4", _CLOSED, [(30, 5)]),
        _edits("edit-trims-both.mp4", _CLOSED, [(20, 5)]),
        _edits("edit-trims-end.mp4", _NO_B, [(25, 0)]),
        _edits("edit-pause.mp4", _CLOSED, [(25, -1), (40, 0)]),
        _edits("edit-two-pieces.mp4", _CLOSED, [(10, 0), (10, 20)]),
        _edits("edit-piece-twice.mp4", _NO_B, [(10, 5), (10, 5)]),
        _edits("edit-backwards.mp4", _NO_B, [(10, 20), (10, 0)]),
        _edits("edit-open-gop.mp4", _OPEN, [(25, 13)]),
    ]


CASES = _edit_lists()
