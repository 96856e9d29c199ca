"""What a search for clips finds: the clips, their classes, and what was left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from hpdm.data.decode import Member

EMPTY = "empty files"
"""The reason for which a video without a single byte is left out."""
_MOST_PLACES = 100


@dataclass(frozen=True, slots=True)
class VideoFile:
    """A clip of a set: its source, its label (0 where there are no classes) and its caption (``""`` for none)."""

    source: str | Member
    label: int
    caption: str = ""

    @property
    def path(self) -> str:
        """The source as text, for messages: the file, or the shard and the member."""
        return str(self.source)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What was left out of a set for one reason."""

    reason: str
    """Names the things in the plural, such as ``"empty files"``."""
    count: int
    places: tuple[str, ...]
    """Where the first hundred are: a path, ``file:line``, or shard and member."""


@dataclass(frozen=True, slots=True)
class Found:
    """A set of clips."""

    class_names: list[str]
    """Names of the classes in the order of their labels; empty for a set without classes."""
    files: list[VideoFile]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    """What was read otherwise than it is written, such as a class name in another spelling."""


@dataclass(slots=True)
class Report:
    """Collects, during a search, what is left out and what is to be noted."""

    notes: list[str] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)
    _places: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, place: object, count: int = 1) -> None:
        """Counts something that is left out.

        Args:
            reason: as in :class:`LeftOut`.
            place: the path, or the line of a file, of the first of them.
            count: how many.
        """
        self._counts[reason] = self._counts.get(reason, 0) + count
        places = self._places.setdefault(reason, [])
        if len(places) < _MOST_PLACES:
            places.append(str(place))

    def add(self, left_out: LeftOut) -> None:
        """Adds what another search left out."""
        self._counts[left_out.reason] = self._counts.get(left_out.reason, 0) + left_out.count
        places = self._places.setdefault(left_out.reason, [])
        places += left_out.places[: _MOST_PLACES - len(places)]

    def left_out(self) -> tuple[LeftOut, ...]:
        """Everything that was left out, by reason, in the order in which the reasons came up."""
        return tuple(LeftOut(reason, n, tuple(self._places[reason])) for reason, n in self._counts.items())
