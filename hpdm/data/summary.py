"""A set of clips in a few lines: how many there are, and what was left out and why."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

from hpdm.data.decode import Member
from hpdm.data.found import Found, LeftOut
from hpdm.printable import printable

log = logging.getLogger(__name__)

_NAMED = 3


def summarize(root: str | os.PathLike[str], found: Found) -> list[str]:
    """Lines that say what was found, what was left out and what was read otherwise than it is written.

    Args:
        root: the set.
        found: its clips.
    """
    classes = "without classes"
    if found.class_names:
        counts = Counter(file.label for file in found.files).values()
        each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        classes = f"of {len(counts)} classes, {each} of each"
    shards = {file.source.archive for file in found.files if isinstance(file.source, Member)}
    place = f"{len(shards):,} shards" if shards else f"{len({file.path for file in found.files}):,} files"
    lines = [f"{root}: {len(found.files):,} clips {classes}, in {place}"]
    lines += [f"left out: {_describe(root, left_out)}" for left_out in found.left_out]
    return [printable(line) for line in lines + [f"note: {note}" for note in found.notes]]


def log_summary(root: str | os.PathLike[str], found: Found) -> None:
    """Logs what :func:`summarize` says."""
    for line in summarize(root, found):
        log.info("%s", line)


def _describe(root: str | os.PathLike[str], left_out: LeftOut) -> str:
    places = [place.removeprefix(f"{Path(root)}{os.sep}") for place in left_out.places[:_NAMED]]
    more = ", ..." if left_out.count > len(places) else ""
    return f"{left_out.reason}: {left_out.count:,} ({', '.join(places)}{more})"
