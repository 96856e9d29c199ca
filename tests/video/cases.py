"""What a case of the corpus is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.video import claims
from tests.video.claims import Claim
from tests.video.encoding import Video, write


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
    return Case(
        name,
        kind,
        lambda path: write(path, video, **rest),
        claims=(*wanted, in_order),
        encoders=(video.codec,),
        **fields,
    )
