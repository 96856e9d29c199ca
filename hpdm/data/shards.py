"""Tar shards in webdataset's layout, with random access: an index says where each clip is, and nothing is unpacked.

A shard is an uncompressed tar in which the files of one clip share a key, the name up to its first dot: ``key.mp4``,
``key.cls`` (the label, an integer) or ``key.json`` (with ``label``, ``class`` or ``caption``), ``key.txt`` (the
caption). Where no key of the shards has a video, ``key.jpg`` and other images are the clips. Class names come from
``classes.json`` (a list) or ``classInd.txt`` beside the shards, else from the members.

The package webdataset itself is not used. It reads shards as streams, in an order that depends on the number of workers
and on a shuffle buffer whose state is not saved, so that a resumed run would see other clips than an uninterrupted one.
Its random access (wids, removed in version 1.0) reads whole members and takes a damaged header for the end of a shard.
With an index of byte ranges, shards are read like a folder: in the same order, with the same cache and the same
handling of damage. :mod:`hpdm.data.shard_writer` writes shards.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hpdm.data.decode import Member
from hpdm.data.layout import VideoFile, read_class_index, read_text
from hpdm.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image, is_video, listed
from hpdm.files import write_text

log = logging.getLogger(__name__)

CLASSES_FILE = "classes.json"
_INDEX_VERSION = 2
_MAX_CLASSES = 1_000_000  # a larger number in a .cls is taken for an error
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")  # webdataset's key and extension


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip of a shard: where its bytes are, and what the other members of its key say about it."""

    name: str  # of the video's member
    offset: int  # of the video's first byte in the shard
    size: int  # of the video, in bytes
    label: int | None
    class_name: str | None
    caption: str  # "" for none


def find_shards(root: str | os.PathLike[str]) -> list[Path] | None:
    """The shards that ``root`` stands for; ``None`` where it stands for no shards.

    Args:
        root: a folder that holds ``*.tar``, a tar, or a pattern of tars with braces (``shard-{000000..000009}.tar``,
            ``{a,b}.tar``) or wildcards.

    Raises:
        FileNotFoundError: a pattern that nothing matches, or one with braces that names a missing shard.
        ValueError: a pattern that matches a file that is no tar.
    """
    if os.path.isdir(root):
        return sorted(path for path in Path(root).glob("[!.]*.tar") if path.is_file()) or None
    pattern = os.fspath(root)
    if os.path.isfile(root):
        return [Path(root)] if pattern.endswith(".tar") else None
    if not pattern.endswith(".tar") and "{" not in pattern and not glob.has_magic(pattern):
        return None
    names = [
        name
        for part in _expand_braces(pattern)
        for name in (sorted(glob.glob(part)) if glob.has_magic(part) else [part])
    ]
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


def _expand_braces(pattern: str) -> list[str]:
    """All names that a pattern with ``{first..last}`` or ``{a,b}`` stands for, as a shell expands it."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    values = (
        [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)] if choices is None else choices.split(",")
    )
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [name for value in values for name in _expand_braces(f"{head}{value}{tail}")]


def read_shards(paths: Sequence[Path]) -> tuple[list[str], list[VideoFile]]:
    """Class names (empty where no clip has a label) and clips of a set of shards, in the order of the shards.

    Raises:
        ValueError: a shard that is damaged, cut off, compressed or without videos; clips with and without labels;
            labels and class names that contradict each other. The message names the shard and the member.
    """
    entries = [
        (path, entry)
        for path in tqdm(paths, desc="shards", unit="shard", delay=2, leave=False)
        for entry in index_shard(path)
    ]
    images = sum(is_image(entry.name) for _, entry in entries)
    if 0 < images < len(entries):
        log.info("%s: %d images without a video beside the videos are not used", paths[0].parent, images)
        entries = [(path, entry) for path, entry in entries if not is_image(entry.name)]
    names, labels = _labels(_listed_classes(paths), entries)
    return names, [
        VideoFile(Member(str(path), entry.name, entry.offset, entry.size), label, entry.caption)
        for (path, entry), label in zip(entries, labels)
    ]


def index_shard(path: Path) -> list[Entry]:
    """The clips of one shard.

    They are saved in ``shard.tar.index.json`` beside the shard, which is valid as long as the shard's size and time of
    modification are the ones that it records. Where the folder is not writable, every call scans the shard.

    Raises:
        ValueError: as :func:`read_shards`.
    """
    stat = path.stat()
    shard_version = {"version": _INDEX_VERSION, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    index = path.with_name(f"{path.name}.index.json")
    try:
        saved = json.loads(index.read_text(encoding="utf-8"))
        if {key: saved[key] for key in shard_version} == shard_version:
            return [Entry(**entry) for entry in saved["clips"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, damaged or of another format: it is written anew
    entries = _scan(path)
    try:
        write_text(index, json.dumps({**shard_version, "clips": [asdict(entry) for entry in entries]}))
    except OSError as error:
        log.info("%s: the index is not saved: %s", path, error)
    return entries


def _scan(path: Path) -> list[Entry]:
    """Reads a shard from end to end and collects the members of each key."""
    place = "at its start"
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                place = f"in or after member {member.name!r}"
                match = _NAME.fullmatch(member.name.removeprefix("./"))
                if match is None or not member.isreg() or member.issparse():
                    continue
                key, kind = match[1], match[2].lower()
                kind = "video" if is_video(member.name) else kind
                if kind in samples.setdefault(key, {}):
                    raise ValueError(f"{path}: {member.name!r} is the second {kind} of its key, expected one")
                samples[key][kind] = member
            # tarfile stops without an error at a damaged header or at the end of a file that was cut off; the end of a
            # complete tar is a block of zeros.
            with open(path, "rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no header and no end mark at byte {tar.offset}")
            for members in samples.values():
                _take_image(path, members)
            entries = [_entry(path, tar, members) for members in samples.values() if "video" in members]
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not an uncompressed tar, cut off or damaged, {place}: {error}") from None
    if not entries:
        raise ValueError(
            f"{path}: no videos in it, expected names ending in {listed(VIDEO_SUFFIXES)}, or images alone "
            f"({listed(IMAGE_SUFFIXES)})"
        )
    return entries


def _take_image(path: Path, members: dict[str, tarfile.TarInfo]) -> None:
    """Takes the image of a key without a video as its video; ``key.thumb.jpg`` is no image of the key."""
    images = [kind for kind in members if f".{kind}" in IMAGE_SUFFIXES]
    if "video" in members or not images:
        return
    if len(images) > 1:
        raise ValueError(f"{path}: {members[images[1]].name!r} is the second image of its key, expected one")
    members["video"] = members[images[0]]


def _entry(path: Path, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> Entry:
    """Builds the entry of one key from its members, by their kinds: "video", "cls", "json", "txt"."""

    def error(kind: str, what: str) -> ValueError:
        return ValueError(f"{path}: member {members[kind].name!r}: {what}")

    def text(kind: str) -> str:
        file = tar.extractfile(members[kind]) if kind in members else None
        try:
            return file.read().decode("utf-8").strip() if file is not None else ""
        except UnicodeDecodeError:
            raise error(kind, "not UTF-8 text") from None

    record: Any = {}
    if "json" in members:
        try:
            record = json.loads(text("json"))
        except json.JSONDecodeError as problem:
            raise error("json", f"not JSON: {problem}") from None
        if not isinstance(record, dict):
            raise error("json", "expected an object with 'label', 'class' or 'caption'")
    label, class_name, caption = (record.get(key) for key in ("label", "class", "caption"))
    if label is not None and (type(label) is not int or not 0 <= label < _MAX_CLASSES):
        raise error("json", f"label: got {label!r}, expected an integer from 0 to {_MAX_CLASSES - 1}")
    for key, value in (("class", class_name), ("caption", caption)):
        if value is not None and not isinstance(value, str):
            raise error("json", f"{key}: got {value!r}, expected a text")
    if "cls" in members:
        number = text("cls")
        if not re.fullmatch(r"\d+", number, re.ASCII) or int(number) >= _MAX_CLASSES:
            raise error("cls", f"got {number!r}, expected an integer from 0 to {_MAX_CLASSES - 1}")
        if label is not None and label != int(number):
            raise error("cls", f"got {number}, but the json says {label}")
        label = int(number)
    video = members["video"]
    name = video.name.removeprefix("./")
    return Entry(name, video.offset_data, video.size, label, class_name, text("txt") or (caption or "").strip())


def _listed_classes(paths: Sequence[Path]) -> list[str] | None:
    """The class names in the files beside the shards; ``None`` where there are no such files."""
    by_file: dict[Path, list[str]] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        if (folder / CLASSES_FILE).is_file():
            by_file[folder / CLASSES_FILE] = _read_classes(folder / CLASSES_FILE)
        elif (folder / "classInd.txt").is_file():
            by_file[folder / "classInd.txt"] = read_class_index(folder / "classInd.txt")
    if not by_file:
        return None
    (first, names), *others = by_file.items()
    for file, other in others:
        if other != names:
            raise ValueError(f"root: {file} and {first} list different classes")
    return names


def _read_classes(path: Path) -> list[str]:
    try:
        names = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{path}: expected a list of different class names, in the order of their labels")
    return names


def _labels(names: list[str] | None, entries: list[tuple[Path, Entry]]) -> tuple[list[str], list[int]]:
    """All class names and the label of each clip; no names and labels of 0 for a set without labels."""
    unlabeled = [entry.label is None and entry.class_name is None for _, entry in entries]
    if names is None and all(unlabeled):
        return [], [0] * len(entries)
    if any(unlabeled):
        path, entry = entries[unlabeled.index(True)]
        raise ValueError(f"{path}/{entry.name}: no label ({sum(unlabeled)} of {len(entries)} clips have none)")
    if names is None:
        names = _named_classes(entries)
    numbers = {name: label for label, name in enumerate(names)}
    labels = []
    for path, entry in entries:
        label = entry.label if entry.class_name is None else numbers.get(entry.class_name)
        if label is None or label >= len(names):
            got = f"class {entry.class_name!r}" if label is None else f"label {label}"
            raise ValueError(f"{path}/{entry.name}: {got} is not one of the {len(names)} classes")
        if entry.label is not None and entry.label != label:
            raise ValueError(
                f"{path}/{entry.name}: got label {entry.label} for class {entry.class_name!r}, expected {label}"
            )
        labels.append(label)
    return names, labels


def _named_classes(entries: list[tuple[Path, Entry]]) -> list[str]:
    """Class names from the members of the shards; a label without a name is named by its number."""
    if all(entry.label is None for _, entry in entries):
        return sorted({entry.class_name for _, entry in entries if entry.class_name is not None})
    names: dict[int, str] = {}
    for _, entry in entries:
        if entry.label is not None:
            names.setdefault(entry.label, str(entry.label) if entry.class_name is None else entry.class_name)
    return [names.get(label, str(label)) for label in range(max(names) + 1)]
