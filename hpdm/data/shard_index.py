"""The index of one tar shard: where each clip's bytes are, and what the other members of its key say about it."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Annotated, TypedDict

from hpdm.data.captions import MAX_CAPTION_BYTES, check_caption
from hpdm.data.class_names import check_class_name
from hpdm.data.found import EMPTY, LeftOut, Report
from hpdm.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_video, listed
from hpdm.data.tar_members import MAX_HEADER_BYTES, TarDamageError, TarMember, follow_links, read_members
from hpdm.files import decode_text, write_text
from hpdm.json_file import Range, parse_json, read_json

log = logging.getLogger(__name__)

_VERSION = 2
MAX_CLASSES = 1_000_000
"""A larger number in a ``.cls`` is taken for an error."""
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_BYTES = {"cls": 1024, "txt": MAX_CAPTION_BYTES, "json": 16 * 2**20}
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # webdataset's key and extension

# What a member ``key.json`` may say, beside other things. Not a class, since a field is called "class".
_Record = TypedDict(
    "_Record",
    {
        "label": Annotated[int, Range(0, MAX_CLASSES - 1)] | None,
        "class": Annotated[str, Range(0, 2**20)] | None,
        "caption": Annotated[str, Range(0, 2**24)] | None,
    },
    total=False,
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip of a shard: where its bytes are, and what the other members of its key say about it."""

    name: Annotated[str, Range(1, MAX_HEADER_BYTES)]  # of the video's member
    offset: Annotated[int, Range(0, 2**62)]  # of the video's first byte in the shard
    size: Annotated[int, Range(1, 2**62)]  # of the video, in bytes
    label: Annotated[int, Range(0, MAX_CLASSES - 1)] | None
    class_name: str | None
    caption: str  # "" for none


class _SavedIndex(TypedDict):
    """The file of an index: the version of its format, what it knows of the shard, and the :class:`ShardIndex`."""

    version: int
    bytes: Annotated[int, Range(0, 2**62)]
    mtime_ns: Annotated[int, Range(-(2**63), 2**63)]
    clips: Annotated[list[Entry], Range(1, 2**31)]
    left_out: list[LeftOut]


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What is in a shard."""

    clips: list[Entry]
    left_out: tuple[LeftOut, ...]


def index_shard(path: Path) -> ShardIndex:
    """The clips of one shard, and the members that are left out.

    They are saved in ``shard.tar.index.json`` beside the shard, which is valid as long as the shard's size and time of
    modification are the ones that it records. Where the folder is not writable, every call scans the shard.

    Raises:
        ValueError: a shard that is damaged, cut off, compressed or without videos, or a member that contradicts
            another. The message names the shard and the member.
    """
    stat = path.stat()
    shard_version = {"version": _VERSION, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    index = path.with_name(f"{path.name}.index.json")
    try:
        saved = read_json(index, _SavedIndex, _MAX_INDEX_BYTES)
        if {key: saved[key] for key in shard_version} == shard_version:
            return _checked_index(saved, stat.st_size)
    except (OSError, ValueError):
        pass  # missing, damaged or of another format: it is written anew
    found = scan(path)
    values = {"clips": [asdict(entry) for entry in found.clips], "left_out": [asdict(o) for o in found.left_out]}
    text = json.dumps({**shard_version, **values})
    if len(text) > _MAX_INDEX_BYTES:
        log.info("%s: the index is not saved: it has %d bytes, at most %d are read", path, len(text), _MAX_INDEX_BYTES)
        return found
    try:
        write_text(index, text)
    except OSError as error:
        log.info("%s: the index is not saved: %s", path, error)
    return found


def _checked_index(saved: _SavedIndex, shard_bytes: int) -> ShardIndex:
    """A saved index.

    Raises:
        ValueError: values that :func:`index_shard` does not write for a shard of ``shard_bytes``.
    """
    clips = saved["clips"]
    for clip in clips:
        if clip.offset + clip.size > shard_bytes:
            raise ValueError(f"{clip.name}: ends behind the shard")
        if clip.class_name is not None:
            check_class_name(clip.class_name, clip.name)
        check_caption(clip.caption, clip.name)
    return ShardIndex(clips, tuple(saved["left_out"]))


def scan(path: Path) -> ShardIndex:
    """Reads a shard from end to end and collects the members of each key; errors as :func:`index_shard`."""
    try:
        with path.open("rb") as file:
            return _Scan(path, file).run()
    except TarDamageError as error:
        raise ValueError(f"{path}: {error}") from None


class _Scan:
    """One reading of a shard."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.report = path, file, Report()

    def run(self) -> ShardIndex:
        members = list(read_members(self.file))
        by_name = {posixpath.normpath(member.name): member for member in members}
        samples: dict[str, dict[str, TarMember]] = {}
        for member in members:
            match = _NAME.fullmatch(member.name)
            if member.kind == "folder":
                continue
            if match is None or member.kind == "other":
                self._leave_out(_why_not_read(member), member)
                continue
            key, kind = match[1], match[2].lower()
            kind = "video" if is_video(member.name) else kind
            if kind in samples.setdefault(key, {}):
                raise ValueError(f"{self.path}: {member.name!r} is the second {kind} of its key, expected one")
            samples[key][kind] = member
        if not any("video" in sample for sample in samples.values()):
            for sample in samples.values():
                _take_image(sample)
        clips = []
        for sample in samples.values():
            if "video" not in sample:
                for member in sample.values():
                    self._leave_out("members that belong to no video", member)
                continue
            # A link is read where the file that it leads to is.
            files = {
                kind: follow_links(by_name, posixpath.normpath(member.name))
                for kind, member in sample.items()
                if kind in ("video", *_MAX_BYTES)
            }
            if not files["video"].size:
                self._leave_out(EMPTY, sample["video"])
                continue
            clips.append(self._entry(sample, files))
        if not clips:
            raise ValueError(
                f"{self.path}: no videos in it, expected names ending in {listed(VIDEO_SUFFIXES)}, or images, one of "
                f"each key ({listed(IMAGE_SUFFIXES)})"
            )
        return ShardIndex(clips, self.report.left_out())

    def _leave_out(self, reason: str, member: TarMember) -> None:
        self.report.leave_out(reason, f"{self.path.name}/{member.name}")

    def _entry(self, members: Mapping[str, TarMember], files: Mapping[str, TarMember]) -> Entry:
        """The entry of one key from its members, by their kinds: "video", "cls", "json", "txt"."""
        texts = {
            kind: self._text(members[kind], files[kind], limit) for kind, limit in _MAX_BYTES.items() if kind in files
        }
        label, class_name, caption = None, None, ""
        if "json" in texts:
            label, class_name, caption = _parse_record(texts["json"], self._place(members["json"]))
        if "cls" in texts:
            number, place = texts["cls"], self._place(members["cls"])
            if not re.fullmatch(r"\d{1,7}", number, re.ASCII) or int(number) >= MAX_CLASSES:
                raise ValueError(f"{place}: got {number[:40]!r}, expected an integer from 0 to {MAX_CLASSES - 1}")
            if label is not None and label != int(number):
                raise ValueError(f"{place}: got {number}, but the json says {label}")
            label = int(number)
        video = files["video"]
        return Entry(members["video"].name, video.offset, video.size, label, class_name, texts.get("txt") or caption)

    def _place(self, member: TarMember) -> str:
        return f"{self.path}: member {member.name!r}"

    def _text(self, member: TarMember, file: TarMember, limit: int) -> str:
        if file.size > limit:
            raise ValueError(f"{self._place(member)}: got {file.size} bytes, expected at most {limit}")
        self.file.seek(file.offset)
        return decode_text(self.file.read(file.size), self._place(member)).strip()


def _take_image(sample: dict[str, TarMember]) -> None:
    """In a shard without videos, takes the one image of a key for its video; ``key.thumb.jpg`` is no image of it."""
    images = [kind for kind in sample if f".{kind}" in IMAGE_SUFFIXES]
    if len(images) == 1:
        sample["video"] = sample.pop(images[0])


def _why_not_read(member: TarMember) -> str:
    if member.kind == "other":
        return "members that are no files"
    hidden = posixpath.basename(member.name).startswith(".")
    return "hidden members" if hidden else "members without a suffix"


def _parse_record(text: str, place: str) -> tuple[int | None, str | None, str]:
    """The label, the class and the caption in a json."""
    record = parse_json(text, _Record, place)
    class_name = record.get("class")
    if class_name is not None:
        check_class_name(class_name, place)
    return record.get("label"), class_name, check_caption((record.get("caption") or "").strip(), place)
