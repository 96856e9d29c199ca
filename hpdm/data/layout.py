"""From a folder of videos to a list of files with labels and captions.

The folder may hold class folders, with or without UCF-101's split files, or be flat; captions are in text files beside
the clips or in one file for all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hpdm.data.decode import Member
from hpdm.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES, is_image, is_video, listed

log = logging.getLogger(__name__)

Split = Literal["train", "test"]
"""A side of UCF-101's official splits."""
SPLIT_FOLDER = "ucfTrainTestlist"
CAPTIONS_FILE = "captions.jsonl"


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


def find_videos(
    root: str | os.PathLike[str], split_file: str | os.PathLike[str] | None = None
) -> tuple[list[str], list[VideoFile]]:
    """Class names (empty for a flat folder) and files of a set; :class:`~hpdm.data.clips.VideoDataset` has the layouts.

    Images are the files of a set without any video. Beside videos they are taken for thumbnails and left out.

    Raises:
        FileNotFoundError: no such folder, split file or listed clip.
        ValueError: no videos and no images, files both beside and inside class folders, a class that the set does not
            have.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    flat, folders = _files_of(root)
    if flat and folders:
        raise ValueError(
            f"root: {root} holds videos beside class folders ({', '.join(list(folders)[:3])}), expected one"
        )
    if not flat and not folders:
        raise ValueError(
            f"root: no videos in {root} or the folders in it, expected names ending in {listed(VIDEO_SUFFIXES)}, or "
            f"images alone ({listed(IMAGE_SUFFIXES)})"
        )
    if flat and split_file is not None:
        raise ValueError(f"split_file: {root} has no class folders, which a split needs")
    if flat:
        return [], [VideoFile(str(path), 0) for path in flat]
    lists = [Path(split_file).parent] if split_file is not None else _split_folders(root)
    index = next((path for folder in lists if (path := folder / "classInd.txt").is_file()), None)
    names = read_class_index(index) if index is not None else list(folders)
    if split_file is not None:
        return names, _read_split(root, Path(split_file), names, folders)
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise ValueError(f"root: class folder {unknown[0]!r} is not in {index}")
    return names, [VideoFile(str(path), names.index(name)) for name, paths in folders.items() for path in paths]


def _files_of(root: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The files of a set beside and inside its class folders: its videos, or its images where it has no video."""
    videos, images = ((_files_in(root, kind), _class_folders(root, kind)) for kind in (is_video, is_image))
    if not any(videos):
        return images
    if any(images):
        count = len(images[0]) + sum(map(len, images[1].values()))
        log.info("%s: %d images beside the videos are not used", root, count)
    return videos


def has_videos(root: str | os.PathLike[str]) -> bool:
    """Whether there are videos in a folder or in the folders directly below it."""
    return bool(_files_in(Path(root), is_video) or _class_folders(Path(root), is_video))


def add_captions(root: str | os.PathLike[str], files: list[VideoFile]) -> list[VideoFile]:
    """The files of a folder with their captions, ``""`` where there is none.

    A caption comes from ``root/captions.jsonl``, UTF-8 lines ``{"file": "relative/path.mp4", "caption": "..."}``, or
    else from a UTF-8 text file of the clip's name beside it.

    Raises:
        ValueError: a line in another format, a file that is not UTF-8.
    """
    root = Path(root)
    listed = _read_captions(root / CAPTIONS_FILE) if (root / CAPTIONS_FILE).is_file() else {}
    captioned = []
    for file in files:
        path = Path(file.path)
        caption = listed.get(path.relative_to(root).as_posix(), "")
        if not caption and (sidecar := path.with_suffix(".txt")).is_file():
            caption = read_text(sidecar).strip()
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


def _read_captions(path: Path) -> dict[str, str]:
    """The captions of a ``captions.jsonl``, by the files' paths relative to its folder."""
    captions: dict[str, str] = {}
    for place, line in _lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("file", "caption")):
            raise ValueError(f'{place}: got {line!r}, expected {{"file": "relative/path.mp4", "caption": "..."}}')
        if record["file"] in captions:
            raise ValueError(f"{place}: {record['file']} has a caption already, expected one line per clip")
        captions[record["file"]] = record["caption"].strip()
    return captions


def read_text(path: Path) -> str:
    """The contents of a UTF-8 file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with ``path:line number`` for messages."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.rstrip("\r")


def _files_in(folder: Path, is_wanted: Callable[[str], bool]) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if is_wanted(e.name) and e.is_file()]
    # A name that starts with a dot is a file being written, or one that a desktop environment left.
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _class_folders(root: Path, is_wanted: Callable[[str], bool]) -> dict[str, list[Path]]:
    return {
        folder.name: files
        for folder in sorted(root.iterdir())
        if folder.is_dir() and (files := _files_in(folder, is_wanted))
    }


def _split_folders(root: Path) -> list[Path]:
    return [root, root / SPLIT_FOLDER, root.parent / SPLIT_FOLDER]


def find_split_file(root: Path, split: Split, fold: int) -> Path:
    """The official list of a split, in ``root``, in ``root/ucfTrainTestlist`` or beside ``root``.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    name = f"{split}list{fold:02d}.txt"
    for folder in _split_folders(root):
        if (folder / name).is_file():
            return folder / name
    searched = ", ".join(str(folder) for folder in _split_folders(root))
    raise FileNotFoundError(f"split: no {name} in {searched}")


def split_applies(root: Path, split: Split, fold: int = 1) -> bool:
    """Whether there is an official list of the split that names a clip of this folder.

    Lists that lie beside the folder may be those of another set beside it.
    """
    try:
        path = find_split_file(root, split, fold)
    except FileNotFoundError:
        return False
    stems = {f"{name}/{file.stem}" for name, files in _files_of(root)[1].items() for file in files}
    return any(os.path.splitext(line.split()[0])[0] in stems for _, line in _lines(path))


def read_class_index(path: Path) -> list[str]:
    """The class names of a ``classInd.txt``, lines ``1 ClassName`` in order.

    Raises:
        ValueError: a line in another format.
    """
    names: list[str] = []
    for place, line in _lines(path):
        fields = line.split()
        if len(fields) != 2 or fields[0] != str(len(names) + 1):
            raise ValueError(f"{place}: got {line!r}, expected '{len(names) + 1} ClassName'")
        names.append(fields[1])
    return names


def _read_split(root: Path, path: Path, names: list[str], folders: dict[str, list[Path]]) -> list[VideoFile]:
    """Reads lines ``Class/clip.avi 1`` (train) or ``Class/clip.avi`` (test)."""
    if not path.is_file():
        raise FileNotFoundError(f"split_file: {path} is not a file")
    by_stem = {(name, video.stem): video for name, videos in folders.items() for video in videos}
    files = []
    for place, line in _lines(path):
        listed, *label = line.split()
        name, _, clip = listed.rpartition("/")
        if not name or not clip or len(label) > 1 or (label and not label[0].isdecimal()):
            raise ValueError(f"{place}: got {line!r}, expected 'Class/clip.avi' or 'Class/clip.avi label'")
        if name not in names:
            raise ValueError(f"{place}: class {name!r} is not one of the {len(names)} classes of {root}")
        if label and label != [str(names.index(name) + 1)]:
            raise ValueError(f"{place}: got label {' '.join(label)} for {name}, expected {names.index(name) + 1}")
        video = root / listed
        if not video.is_file():
            # Copies of UCF-101 are often transcoded from avi to mp4.
            transcoded = by_stem.get((name, Path(clip).stem))
            if transcoded is None:
                raise FileNotFoundError(f"{place}: {video} does not exist, under no video suffix")
            video = transcoded
        files.append(VideoFile(str(video), names.index(name)))
    if not files:
        raise ValueError(f"split_file: {path} lists no clips")
    return files
