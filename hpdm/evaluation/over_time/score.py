"""The measurements of many long videos of the synthetic set, generated and real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpdm import distributed
from hpdm.evaluation.over_time.borders import CLIP, BorderWindows
from hpdm.evaluation.over_time.sources import Pieces
from hpdm.evaluation.over_time.summary import summarize, times_of
from hpdm.evaluation.over_time.video import Track, VideoOverTime


def measure_tracks(
    pieces: Pieces, names: Sequence[str] | None, steps: np.ndarray, borders: Sequence[int]
) -> list[Track]:
    """Measures videos of one length while their pieces come. A collective: all ranks return the same.

    Args:
        pieces: of this rank's videos; pieces of several videos may alternate.
        names: the class that each video should show, by its number; ``None``: shape and color of its own first clip.
        steps: the frames' numbers in a rendered file, int64 ``[N]`` from 0.
        borders: the frames with which a window begins to be new, but for the first.

    Returns:
        The measurements of the videos of all ranks, by number.

    Raises:
        ValueError: a video ends early.
    """
    unfinished: dict[int, VideoOverTime] = {}
    tracks: dict[int, Track] = {}
    for number, frames in pieces:
        if number not in unfinished:
            unfinished[number] = VideoOverTime(None if names is None else names[number], steps, borders)
        unfinished[number].add(frames)
        if unfinished[number].done == len(steps):
            tracks[number] = unfinished.pop(number).result()
    if unfinished:
        number, video = next(iter(unfinished.items()))
        raise ValueError(f"frames: got {video.done} of video {number}, expected {len(steps)}")
    return distributed.gather(tracks)


def compare(
    real: Sequence[Track], generated: Sequence[Track], frames: int, borders: Sequence[int], *, own_start: bool
) -> dict[str, Any]:
    """All that is reported of real and generated videos of ``frames`` frames, as plain values.

    Args:
        real, generated: from :func:`measure_tracks`, at least one of each.
        frames: of a video.
        borders: as of :func:`measure_tracks`.
        own_start: whether shape and color are compared with those of the video's own first clip.

    Returns:
        ``frames``, of a video, ``clip``, of a clip, and ``times``, the middles of the clips in frames. ``borders``:
        frames at which windows begin to be new. ``expected``: "class" or "start". ``real`` and ``generated``: see
        :func:`hpdm.evaluation.over_time.summary.summarize`. ``tracks``: every generated video's expected shape and
        color, and its curves.
    """
    clips = frames // CLIP
    windows = BorderWindows.of([b for b in borders if b < clips * CLIP], clips * CLIP)
    return {
        "frames": frames,
        "clip": CLIP,
        "times": times_of(clips).tolist(),
        "borders": list(borders),
        "expected": "start" if own_start else "class",
        "real": summarize(real, windows),
        "generated": summarize(generated, windows),
        "tracks": [track.expected._asdict() | {"curves": _plain(track)} for track in generated],
    }


def _plain(track: Track) -> dict[str, list[float | None]]:
    """The curves of a video with ``None`` in place of NaN."""
    return {
        name: [float(value) if np.isfinite(value) else None for value in values]
        for name, values in track.curves.items()
    }
