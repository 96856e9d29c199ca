"""Whether a run that goes on has the clips that it began with: a short text for each set, and what changed.

A clip counts with its name relative to its set, its size in bytes, its label and its caption, and all clips count in
their order. No video is read. So a set may move to another place, or be packed into shards, and stays the same; another
video of the same name and size is not noticed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Annotated, NamedTuple, Protocol

from hpdm.data.decode import Member
from hpdm.data.found import VideoFile
from hpdm.files import atomic_path, decode_text
from hpdm.json_file import Range, parse_json

LIST_FILE = "clips.jsonl.gz"
"""The clips of a run, in its folder: a JSON array ``[set, name, bytes, label, caption's hash]`` per line."""
MOST_LISTED = 1_000_000
"""Clips in the file. Of more than that a run keeps their number and hash alone."""
_MOST_BYTES = 2**30  # of the file, unpacked
_NAMED = 3
_Line = tuple[str, str, Annotated[int, Range(0, 2**62)], int, str]

Key = tuple[str, int]


class ClipRecord(NamedTuple):
    """What identifies a clip in its set."""

    name: str
    """Relative to the set, with slashes; as ``hpdm data shard`` names members, whether or not it is in a shard."""
    size: int
    """In bytes."""
    label: int
    """0 where labels do not matter."""
    caption: str
    """Hash of the caption; empty where captions do not matter."""


class Clips(Protocol):
    """A set of clips, such as a :class:`hpdm.data.clips.VideoDataset`."""

    root: Path
    files: list[VideoFile]

    def __len__(self) -> int:
        """Number of clips."""


class ClipSet:
    """A set of clips, as it is now.

    Args:
        clips: the set.
        labeled: whether labels matter.
    """

    def __init__(self, clips: Clips, *, labeled: bool) -> None:
        self.clips, self.labeled = clips, labeled

    def records(self) -> Iterator[ClipRecord]:
        """The clips in their order.

        Raises:
            OSError: a file is gone.
        """
        for file in self.clips.files:
            if isinstance(file.source, Member):
                name, size = file.source.name, file.source.size
            else:
                name, size = file.source.removeprefix(f"{self.clips.root}{os.sep}"), os.stat(file.source).st_size
            caption = hashlib.sha256(file.caption.encode()).hexdigest()[:16] if file.caption else ""
            yield ClipRecord(_unpacked(name), size, file.label if self.labeled else 0, caption)

    @cached_property
    def fingerprint(self) -> str:
        """As :func:`fingerprint`; raises as :meth:`records`."""
        return fingerprint(self.records())


def fingerprint(records: Iterable[ClipRecord]) -> str:
    """The number of clips and a hash of all that is in their records."""
    digest, count = hashlib.sha256(), 0
    for record in records:
        digest.update(json.dumps(record).encode())
        count += 1
    return f"{count} clips, {digest.hexdigest()[:16]}"


def _unpacked(name: str) -> str:
    """A name without what packing changes in it: dots in front of the suffix, and a suffix in capitals."""
    path = PurePath(name)
    return (path.parent / f"{path.stem.replace('.', '_')}{path.suffix.lower()}").as_posix()


def differences(before: Sequence[ClipRecord], now: Sequence[ClipRecord]) -> str:
    """What distinguishes two lists of clips, as counts with the first names, e.g. ``1 removed (Disc/a.mp4)``."""
    old, new = _by_name(before), _by_name(now)
    renamed = _renamed(old, new)
    new_names = set(renamed.values())
    both = [key for key in old if key in new]
    found = {
        "removed": [key[0] for key in old if key not in new and key not in renamed],
        "added": [key[0] for key in new if key not in old and key not in new_names],
        "renamed": [f"{before} -> {now}" for (before, _), (now, _) in renamed.items()],
        "of another size": [key[0] for key in both if old[key].size != new[key].size],
        "of another class": [key[0] for key in both if old[key].label != new[key].label],
        "with another caption": [key[0] for key in both if old[key].caption != new[key].caption],
    }
    parts = [
        f"{len(names)} {what} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for what, names in found.items()
        if names
    ]
    if both != [key for key in new if key in old]:
        parts.append("another order")
    return ", ".join(parts)


def _by_name(records: Iterable[ClipRecord]) -> dict[Key, ClipRecord]:
    """The clips by name and number: shards may have several of one name."""
    seen = Counter[str]()
    found = {}
    for record in records:
        found[record.name, seen[record.name]] = record
        seen[record.name] += 1
    return found


def _renamed(old: Mapping[Key, ClipRecord], new: Mapping[Key, ClipRecord]) -> dict[Key, Key]:
    """Clips that are gone, each with a new one that differs from it in nothing but the name."""
    gone = defaultdict[tuple[object, ...], deque[Key]](deque)
    for key, record in old.items():
        if key not in new:
            gone[record[1:]].append(key)
    return {gone[record[1:]].popleft(): key for key, record in new.items() if key not in old and gone[record[1:]]}


def save_lists(run: Path, sets: Mapping[str, ClipSet]) -> None:
    """Writes the clips of all sets into a run's folder, unless they are there; of very many clips nothing.

    Raises:
        OSError: a clip is gone, or the file cannot be written; it is then as before.
    """
    path = run / LIST_FILE
    if sum(len(part.clips) for part in sets.values()) > MOST_LISTED:
        path.unlink(missing_ok=True)
        return
    stored = read_lists(run)
    if {name: fingerprint(records) for name, records in stored.items()} == {n: p.fingerprint for n, p in sets.items()}:
        return
    with atomic_path(path) as temporary, temporary.open("wb") as file, gzip.GzipFile("", "wb", 6, file, 0) as packed:
        for name, part in sets.items():
            packed.writelines(json.dumps([name, *record]).encode() + b"\n" for record in part.records())


def read_lists(run: Path) -> dict[str, list[ClipRecord]]:
    """The clips of a run by set; nothing where the file is missing or damaged, since it only serves messages."""
    found = defaultdict(list)
    try:
        with gzip.open(run / LIST_FILE) as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            return {}
        for line in data.splitlines():
            part, *record = parse_json(decode_text(line, LIST_FILE), _Line, LIST_FILE)
            found[part].append(ClipRecord(*record))
    except (OSError, EOFError, ValueError, zlib.error):
        return {}
    return dict(found)
