"""How a folder of videos becomes a list of files with labels: class folders, UCF-101's split files, flat folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset((".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv"))
SPLIT_FOLDER = "ucfTrainTestlist"


@dataclass(frozen=True)
class VideoFile:
    """A file of a set and its label."""

    path: str
    label: int


def find_videos(
    root: str | os.PathLike[str], split_file: str | os.PathLike[str] | None = None
) -> tuple[list[str], list[VideoFile]]:
    """Class names (empty for a flat folder) and files of a set; see :class:`VideoDataset` for the layouts.

    Raises:
        FileNotFoundError: no such folder, split file or listed clip.
        ValueError: no videos, videos both beside and inside class folders, a class that the set does not have.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    flat = _videos_in(root)
    folders = {
        folder.name: videos for folder in sorted(root.iterdir()) if folder.is_dir() and (videos := _videos_in(folder))
    }
    if flat and folders:
        raise ValueError(
            f"root: {root} holds videos beside class folders ({', '.join(list(folders)[:3])}), expected one"
        )
    if not flat and not folders:
        raise ValueError(
            f"root: no videos in {root} or the folders in it, expected names ending in {' '.join(sorted(SUFFIXES))}"
        )
    if flat and split_file is not None:
        raise ValueError(f"split_file: {root} has no class folders, which a split needs")
    if flat:
        return [], [VideoFile(str(path), 0) for path in flat]
    lists = [Path(split_file).parent] if split_file is not None else _split_folders(root)
    index = next((path for folder in lists if (path := folder / "classInd.txt").is_file()), None)
    names = _read_class_index(index) if index is not None else list(folders)
    if split_file is not None:
        return names, _read_split(root, Path(split_file), names, folders)
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise ValueError(f"root: class folder {unknown[0]!r} is not in {index}")
    return names, [VideoFile(str(path), names.index(name)) for name, paths in folders.items() for path in paths]


def _videos_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if os.path.splitext(e.name)[1].lower() in SUFFIXES and e.is_file()]
    # Names that start with a dot are files in the making and desktop debris.
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _split_folders(root: Path) -> list[Path]:
    return [root, root / SPLIT_FOLDER, root.parent / SPLIT_FOLDER]


def find_split_file(root: Path, split: str, fold: int) -> Path:
    """The official list of a split, in ``root``, in ``root/ucfTrainTestlist`` or beside ``root``.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    name = f"{split}list{fold:02d}.txt"
    for folder in _split_folders(root):
        if (folder / name).is_file():
            return folder / name
    looked = ", ".join(str(folder) for folder in _split_folders(root))
    raise FileNotFoundError(f"split: no {name} in {looked}")


def _read_class_index(path: Path) -> list[str]:
    names: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split()
        if len(fields) != 2 or fields[0] != str(len(names) + 1):
            raise ValueError(f"{path}:{number}: got {line!r}, expected '{len(names) + 1} ClassName'")
        names.append(fields[1])
    return names


def _read_split(root: Path, path: Path, names: list[str], folders: dict[str, list[Path]]) -> list[VideoFile]:
    """Reads lines ``Class/clip.avi 1`` (train) or ``Class/clip.avi`` (test)."""
    if not path.is_file():
        raise FileNotFoundError(f"split_file: {path} is not a file")
    by_stem = {(name, video.stem): video for name, videos in folders.items() for video in videos}
    files = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        listed, *label = line.split()
        name, _, clip = listed.rpartition("/")
        if name not in names:
            raise ValueError(f"{path}:{number}: class {name!r} is not one of the {len(names)} classes of {root}")
        if label and label != [str(names.index(name) + 1)]:
            raise ValueError(
                f"{path}:{number}: got label {' '.join(label)} for {name}, expected {names.index(name) + 1}"
            )
        video = root / listed
        if not video.is_file():
            # Copies of UCF-101 are often transcoded from avi to mp4.
            other = by_stem.get((name, Path(clip).stem))
            if other is None:
                raise FileNotFoundError(f"{path}:{number}: {video} does not exist, under no video suffix")
            video = other
        files.append(VideoFile(str(video), names.index(name)))
    if not files:
        raise ValueError(f"split_file: {path} lists no clips")
    return files
