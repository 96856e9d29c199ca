"""Captions of a folder of videos: one file for all, ``captions.jsonl``, or a text file of the clip's name beside it."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Set
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypedDict

from hpdm.data.found import Report, VideoFile
from hpdm.files import read_text
from hpdm.json_file import Range, read_json_lines

CAPTIONS_FILE = "captions.jsonl"
MAX_CAPTION_BYTES = 64 * 1024
"""Longest caption in UTF-8."""


class _Line(TypedDict):
    """A line of ``captions.jsonl``, which may say more."""

    file: Annotated[str, Range(1, 4096)]
    caption: Annotated[str, Range(0, 2**20)]


def add_captions(
    root: str | os.PathLike[str],
    files: Iterable[VideoFile],
    videos: Set[str] | None = None,
    report: Report | None = None,
) -> list[VideoFile]:
    """The files of a folder with their captions, ``""`` where there is none.

    A caption comes from ``root/captions.jsonl``, UTF-8 lines ``{"file": "relative/path.mp4", "caption": "..."}``, or
    else from a UTF-8 text file of the clip's name beside it. Where there are both, the line counts.

    Args:
        root: the folder.
        files: its clips, or some of them.
        videos: the paths of all its videos relative to it, with slashes; those of ``files`` if ``None``.
        report: receives the lines that match no video.

    Raises:
        ValueError: a line in another format, a file that is not UTF-8, a caption longer than 64 KB, or no line that
            matches a video.
    """
    root, files = Path(root), list(files)
    report = Report() if report is None else report
    names = [Path(file.path).relative_to(root).as_posix() for file in files]
    listing = root / CAPTIONS_FILE
    listed = _read_captions(listing, set(names) if videos is None else videos, report) if listing.is_file() else {}
    captioned = []
    for name, file in zip(names, files):
        caption = listed.get(name, "")
        if not caption and (sidecar := Path(file.path).with_suffix(".txt")).is_file():
            caption = read_text(sidecar, MAX_CAPTION_BYTES).strip()
        captioned.append(replace(file, caption=caption))
    return captioned


def check_captions(root: str | os.PathLike[str], files: list[VideoFile]) -> None:
    """Checks that every file has a caption.

    Raises:
        ValueError: some have none; the message counts them and names the first.
    """
    missing = [file.path.removeprefix(f"{root}{os.sep}") for file in files if not file.caption]
    if missing:
        more = ", ..." if len(missing) > 3 else ""
        raise ValueError(
            f"captions: {len(missing)} of {len(files)} clips of {root} have none ({', '.join(missing[:3])}{more}), "
            f"expected each in {CAPTIONS_FILE} or in a .txt of the clip's name"
        )


def _read_captions(path: Path, videos: Set[str], report: Report) -> dict[str, str]:
    """The captions of a ``captions.jsonl``, by the videos' paths relative to its folder."""
    captions: dict[str, str] = {}
    first: dict[str, str] = {}
    unmatched: list[tuple[str, str]] = []
    for place, line in read_json_lines(path, _Line):
        file, caption = line["file"], check_caption(line["caption"].strip(), place)
        name = file if file in videos else posixpath.normpath(file.replace("\\", "/"))
        if name in first:
            raise ValueError(f"{place}: {file} has a caption already, in {first[name]}, expected one line per clip")
        first[name] = place
        if name not in videos:
            unmatched.append((place, file))
        captions[name] = caption
    if unmatched and len(unmatched) == len(captions):
        place, file = unmatched[0]
        raise ValueError(f"{path}: none of its {len(captions)} lines matches a clip; the first names {file!r}")
    for place, file in unmatched:
        report.leave_out(f"lines of {path.name} that match no clip", f"{place} {file!r}")
    return captions


def check_caption(caption: str, place: object) -> str:
    """Returns ``caption`` if it is UTF-8 text of a length that a person writes.

    Raises:
        ValueError: it is longer than 64 KB, or holds what is no character.
    """
    try:
        size = len(caption.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: the caption is not text: {error.reason} at character {error.start}") from None
    if size > MAX_CAPTION_BYTES:
        raise ValueError(f"{place}: got a caption of {size} bytes, expected at most {MAX_CAPTION_BYTES}")
    return caption
