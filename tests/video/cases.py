"""What a case of the corpus is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.video import claims
from tests.video.claims import Claim
from tests.video.encoding import Video, write

DAMAGED = r"(?i)damage|corrupt|invalid|decod|error|broken|lost|missing|differ"
"""Reasons for which a damaged file, or a window of it, may be refused."""


@dataclass(frozen=True)
class Case:
    """A file of the corpus, and what may come out of it."""

    name: str
    """The file's name."""
    kind: str
    """The row of the summary."""
    make: Callable[[Path], None]
    """Writes the file."""
    claims: tuple[Claim, ...] = ()
    """What must be true of the file, or else the case is void."""
    refusal: str = ""
    """A pattern of the reason why the file must be refused; ``""`` where it must be read."""
    may_refuse: str = ""
    """A pattern of reasons for which the file or some windows may be refused; all that is read must be right."""
    seconds: tuple[float, ...] = ()
    """When the encoder was told to show each frame; empty where times are not the case's to know."""
    pixel_aspect: float | None = None
    """Width of a pixel over its height, upright."""
    undefined: range = range(0)
    """Frames with parts that a decoder leaves as it finds its memory: they may look in any way, or be refused."""
    by_command: str = ""
    """Why the ffmpeg program of another version honestly shows something else; ``""`` where both agree."""
    needs_command: bool = False
    """Whether the ffmpeg program writes the file, since no encoder of PyAV does."""
    encoders: tuple[str, ...] = ()
    """Encoders of PyAV that are needed."""


def encoded(name: str, kind: str, video: Video, *wanted: Claim, **rest: Any) -> Case:
    """The case of one encoded video in the container of the name's suffix, which shows its pictures in order.

    What is no field of :class:`Case` is an option of :func:`tests.video.encoding.write`.
    """
    in_order = claims.shows(range(video.frames))
    fields = {key: rest.pop(key) for key in tuple(rest) if key in Case.__dataclass_fields__}
    if _has_times(rest.get("format")):
        fields = {"seconds": _seconds(video), "pixel_aspect": float(video.pixel_aspect or 1)} | fields
    return Case(
        name,
        kind,
        lambda path: write(path, video, **rest),
        claims=(*wanted, in_order),
        encoders=(video.codec,),
        **fields,
    )


def _has_times(format: str | None) -> bool:
    """Whether a container, not a mere stream, holds the frames."""
    return format not in ("h264", "mpeg1video", "mpeg2video", "m4v")


def _seconds(video: Video) -> tuple[float, ...]:
    """When each frame of a video is shown, in seconds from the first."""
    times = range(video.frames) if video.times is None else video.times
    return tuple(float((time - times[0]) * video.time_base) for time in times)
