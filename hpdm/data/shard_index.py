"""The index of one tar shard: where each clip's bytes are, and what the other members of its key say about it."""

from __future__ import annotations

import json
import logging
import posixpath
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hpdm.data.captions import MAX_CAPTION_BYTES, check_caption
from hpdm.data.class_names import check_class_name
from hpdm.data.found import EMPTY, LeftOut, Report
from hpdm.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_video, listed
from hpdm.data.tar_members import TarDamageError, TarMember, follow_links, read_members
from hpdm.files import decode_text, write_text

log = logging.getLogger(__name__)

_VERSION = 2
_MAX_CLASSES = 1_000_000  # a larger number in a .cls is taken for an error
_MAX_BYTES = {"cls": 1024, "txt": MAX_CAPTION_BYTES, "json": 16 * 2**20}
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)  # webdataset's key and extension


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip of a shard: where its bytes are, and what the other members of its key say about it."""

    name: str  # of the video's member
    offset: int  # of the video's first byte in the shard
    size: int  # of the video, in bytes
    label: int | None
    class_name: str | None
    caption: str  # "" for none


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
        saved = json.loads(index.read_text(encoding="utf-8"))
        if {key: saved[key] for key in shard_version} == shard_version:
            return _from_json(saved, stat.st_size)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # missing, damaged or of another format: it is written anew
    found = scan(path)
    values = {"clips": [asdict(entry) for entry in found.clips], "left_out": [asdict(o) for o in found.left_out]}
    try:
        write_text(index, json.dumps({**shard_version, **values}))
    except OSError as error:
        log.info("%s: the index is not saved: %s", path, error)
    return found


def _from_json(saved: Mapping[str, Any], shard_bytes: int) -> ShardIndex:
    """A saved index.

    Raises:
        KeyError, TypeError, ValueError: values of a kind that :func:`index_shard` does not write.
    """
    clips = [Entry(**entry) for entry in saved["clips"]]
    for clip in clips:
        texts = isinstance(clip.name, str) and isinstance(clip.caption, str)
        numbers = type(clip.offset) is int and type(clip.size) is int
        labels = clip.label is None or (type(clip.label) is int and 0 <= clip.label < _MAX_CLASSES)
        if not (texts and numbers and labels) or not 0 <= clip.offset < clip.offset + clip.size <= shard_bytes:
            raise ValueError(f"{clip}: not an entry")
        if clip.class_name is not None:
            check_class_name(clip.class_name, clip.name)
        check_caption(clip.caption, clip.name)
    left_out = tuple(_left_out_from_json(values) for values in saved["left_out"])
    if not clips:
        raise ValueError("no clips")
    return ShardIndex(clips, left_out)


def _left_out_from_json(values: Mapping[str, Any]) -> LeftOut:
    return LeftOut(str(values["reason"]), int(values["count"]), tuple(str(place) for place in values["places"]))


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
            if not re.fullmatch(r"\d{1,7}", number, re.ASCII) or int(number) >= _MAX_CLASSES:
                raise ValueError(f"{place}: got {number[:40]!r}, expected an integer from 0 to {_MAX_CLASSES - 1}")
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
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{place}: not JSON: {problem}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object with 'label', 'class' or 'caption'")
    label, class_name, caption = (record.get(key) for key in ("label", "class", "caption"))
    if label is not None and (type(label) is not int or not 0 <= label < _MAX_CLASSES):
        raise ValueError(f"{place}: label: got {_short(label)}, expected an integer from 0 to {_MAX_CLASSES - 1}")
    for key, value in (("class", class_name), ("caption", caption)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{place}: {key}: got {_short(value)}, expected a text")
    if class_name is not None:
        check_class_name(class_name, place)
    return label, class_name, check_caption((caption or "").strip(), place)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
