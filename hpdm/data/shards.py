"""Tar shards in webdataset's layout, with random access: an index says where each clip is, and nothing is unpacked.

A shard is an uncompressed tar in which the files of one clip share a key, the name up to its first dot: ``key.mp4``,
``key.cls`` (the label, an integer) or ``key.json`` (with ``label``, ``class`` or ``caption``), ``key.txt`` (the
caption). Where no key of the shards has a video, ``key.jpg`` and other images are the clips. Class names come from
``classes.json`` (a list) or ``classInd.txt`` beside the shards, else from the members.
A hard or symbolic link to another member is read as that member; tars joined with ``cat`` are read to the end.

The package webdataset itself is not used. It reads shards as streams, in an order that depends on the number of workers
and on a shuffle buffer whose state is not saved, so that a resumed run would see other clips than an uninterrupted one.
Its random access (wids, removed in version 1.0) reads whole members and takes a damaged header for the end of a shard.
With an index of byte ranges, shards are read like a folder: in the same order, with the same cache and the same
handling of damage. :mod:`hpdm.data.shard_writer` writes shards.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from hpdm.data.decode import Member
from hpdm.data.found import Found, Report, VideoFile
from hpdm.data.shard_index import index_shard
from hpdm.data.shard_labels import assign_labels, listed_classes
from hpdm.data.suffixes import is_image

_MOST_NAMES = 1_000_000


def find_shards(root: str | os.PathLike[str]) -> list[Path] | None:
    """The shards that ``root`` stands for; ``None`` where it stands for no shards.

    Args:
        root: a folder that holds ``*.tar``, a tar, or a pattern of tars with braces (``shard-{000000..000009}.tar``,
            ``{a,b}.tar``) or wildcards.

    Raises:
        FileNotFoundError: a pattern that nothing matches, or one with braces that names a missing shard.
        ValueError: a pattern that matches a file that is no tar, or that stands for more than a million names.
    """
    if os.path.isdir(root):
        return sorted(path for path in Path(root).glob("[!.]*.tar") if path.is_file()) or None
    pattern = os.fspath(root)
    if os.path.isfile(root):
        return [Path(root)] if pattern.endswith(".tar") else None
    if not pattern.endswith(".tar") and "{" not in pattern and not glob.has_magic(pattern):
        return None
    parts = list(islice(_expand_braces(pattern), _MOST_NAMES + 1))
    if len(parts) > _MOST_NAMES:
        raise ValueError(f"root: {pattern} stands for more than {_MOST_NAMES} names")
    names = [name for part in parts for name in (sorted(glob.glob(part)) if glob.has_magic(part) else [part])]
    if not names:
        raise FileNotFoundError(f"root: no file matches {pattern}")
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise FileNotFoundError(
            f"root: {missing[0]} is not a file ({len(missing)} of the {len(names)} shards of {pattern} are missing)"
        )
    other = next((name for name in names if not name.endswith(".tar")), None)
    if other is not None:
        raise ValueError(f"root: {pattern} matches {other}, expected shards with names ending in .tar")
    return [Path(name) for name in dict.fromkeys(names)]


def _expand_braces(pattern: str) -> Iterator[str]:
    """Yields the names that a pattern with ``{first..last}`` or ``{a,b}`` stands for, as a shell expands it."""
    match = re.search(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        yield pattern
        return
    first, last, choices = match.groups()
    values: Iterable[str]
    if choices is None:
        values = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        values = choices.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    for value in values:
        yield from _expand_braces(f"{head}{value}{tail}")


def read_shards(paths: Sequence[Path], report: Report | None = None) -> Found:
    """Class names (none where no clip has a label) and clips of a set of shards, in the order of the shards.

    Args:
        paths: the shards.
        report: receives the members that are left out.

    Raises:
        ValueError: a shard that is damaged, cut off, compressed or without videos; clips with and without labels;
            labels and class names that contradict each other. The message names the shard and the member.
    """
    report = Report() if report is None else report
    entries = []
    for path in tqdm(paths, desc="shards", unit="shard", delay=2, leave=False):
        shard = index_shard(path)
        entries += [(path, entry) for entry in shard.clips]
        for left_out in shard.left_out:
            report.add(left_out)
    images = [(path, entry) for path, entry in entries if is_image(entry.name)]
    if len(images) < len(entries):
        entries = [(path, entry) for path, entry in entries if not is_image(entry.name)]
        for path, entry in images:
            report.leave_out("images beside videos", f"{path.name}/{entry.name}")
    names, labels = assign_labels(listed_classes(paths), entries)
    files = [
        VideoFile(Member(str(path), entry.name, entry.offset, entry.size), label, entry.caption)
        for (path, entry), label in zip(entries, labels)
    ]
    return Found(names, files)
