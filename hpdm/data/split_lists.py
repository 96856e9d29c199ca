"""UCF-101's lists: ``classInd.txt`` names the classes, ``trainlist01.txt`` and ``testlist01.txt`` the clips of a split.

Copies of the set differ from the lists in the clips' suffix and in the case of some names; both are found.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hpdm.data.class_names import ClassIndex, check_class_name, fold
from hpdm.data.found import Report, VideoFile
from hpdm.files import numbered_lines


@dataclass(frozen=True, slots=True)
class ClassFolder:
    """The folder of a class and its videos, at any depth."""

    path: Path
    videos: list[Path]


def read_class_index(path: Path) -> list[str]:
    """The class names of a ``classInd.txt``, lines ``1 ClassName`` in order. Names may hold spaces.

    Raises:
        ValueError: a line in another format, a class that is listed twice, or a name that is not safe.
    """
    names: dict[str, str] = {}
    for place, line in numbered_lines(path):
        fields = line.split(maxsplit=1)
        if len(fields) != 2 or fields[0] != str(len(names) + 1):
            raise ValueError(f"{place}: got {line!r}, expected '{len(names) + 1} ClassName'")
        name = check_class_name(fields[1].rstrip(), place)
        if name in names:
            raise ValueError(f"{place}: class {name!r} is listed already, in {names[name]}")
        names[name] = place
    return list(names)


def read_split(
    path: Path,
    root: Path,
    index: ClassIndex,
    folders: Mapping[str, ClassFolder],
    empty: Set[Path],
    report: Report,
) -> list[VideoFile]:
    """Reads lines ``Class/clip.avi 1`` (train) or ``Class/clip.avi`` (test). Names may hold spaces.

    Args:
        path: the list.
        root: the folder of the set, for messages.
        index: the classes.
        folders: the folder of each class that has one.
        empty: videos without a byte, which are left out; the report has them already.
        report: receives a note where clips are found under another spelling.

    Raises:
        FileNotFoundError: no such list, or a clip that is not there.
        ValueError: a line in another format, a class or label that the set does not have, a clip that several files
            may be.
    """
    if not path.is_file():
        raise FileNotFoundError(f"split_file: {path} is not a file")
    inside = {name: [p for p in empty if folder.path in p.parents] for name, folder in folders.items()}
    clips = {name: _Clips(folder.path, [*folder.videos, *inside[name]]) for name, folder in folders.items()}
    files, respelled = [], []
    for place, line in numbered_lines(path):
        listed, label = _parse(place, line)
        class_part, _, clip = listed.partition("/")
        name = index.find(class_part, place)
        if name is None:
            raise ValueError(f"{place}: class {class_part!r} is not one of the {len(index.labels)} classes of {root}")
        if label is not None and label != index.labels[name] + 1:
            raise ValueError(f"{place}: got label {label} for {name}, expected {index.labels[name] + 1}")
        video = clips[name].find(place, clip) if name in clips else None
        if video is None:
            if not _has_plain_suffix(clip):
                raise ValueError(f"{place}: got {line!r}, expected 'Class/clip.avi' or 'Class/clip.avi label'")
            raise FileNotFoundError(f"{place}: {root / listed} does not exist, under no video suffix")
        if video in empty:
            continue
        if name != class_part or video.stem != PurePosixPath(clip).stem:
            respelled.append(place)
        files.append(VideoFile(str(video), index.labels[name]))
    if not files:
        raise ValueError(f"split_file: {path} lists no clips")
    if respelled:
        report.notes.append(f"{len(respelled)} clips are spelled otherwise in {path.name}, the first is {respelled[0]}")
    return files


def _parse(place: str, line: str) -> tuple[str, int | None]:
    """The path and the label of a line; a last field that is a number is the label."""
    listed, label = line.strip(), None
    fields = listed.rsplit(maxsplit=1)
    if len(fields) == 2 and fields[1].isdecimal() and len(fields[1]) < 10 and "/" in fields[0]:
        listed, label = fields[0], int(fields[1])
    name, _, clip = listed.partition("/")
    path = PurePosixPath(clip)
    if not name or not path.name or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{place}: got {line!r}, expected 'Class/clip.avi' or 'Class/clip.avi label'")
    return listed, label


class _Clips:
    """Finds the videos of a class by what a list calls them."""

    def __init__(self, folder: Path, videos: Iterable[Path]) -> None:
        self.folder = folder
        # By path with suffix, by path without, by name alone, and by name without regard to case.
        self._by_key: tuple[dict[str, list[Path]], ...] = ({}, {}, {}, {})
        for video in videos:
            for table, key in zip(self._by_key, _keys(PurePosixPath(video.relative_to(folder).as_posix()))):
                table.setdefault(key, []).append(video)

    def find(self, place: str, clip: str) -> Path | None:
        """The video that a list calls ``clip``, a path relative to the class folder; ``None`` if there is none.

        Raises:
            ValueError: several videos may be meant.
        """
        listed = PurePosixPath(clip)
        for step, (table, key) in enumerate(zip(self._by_key, _keys(listed))):
            videos = table.get(key, [])
            if len(videos) > 1:
                raise ValueError(f"{place}: {clip} may be {videos[0]} or {videos[1]}, expected one of them")
            if videos:
                return videos[0]
            other = self.folder / listed
            if step == 0 and other.is_file() and other.stat().st_size:
                return other  # listed under a suffix that is not taken for a video's otherwise
            if not _has_plain_suffix(clip):
                return None  # more than a suffix follows the name, such as another column
        return None


def _has_plain_suffix(clip: str) -> bool:
    return re.fullmatch(r"(\.\w{1,5})?", PurePosixPath(clip).suffix) is not None


def _keys(clip: PurePosixPath) -> tuple[str, str, str, str]:
    return str(clip), str(clip.with_suffix("")), clip.stem, fold(clip.stem)
