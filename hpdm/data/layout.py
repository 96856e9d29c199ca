"""From a folder of videos to a list of files with labels.

The folder may hold class folders, with or without UCF-101's split files, or be flat. Captions are in
:mod:`hpdm.data.captions`, lists of classes and clips in :mod:`hpdm.data.split_lists`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpdm.data.class_names import ClassIndex, check_class_name, check_number
from hpdm.data.found import EMPTY, Found, Report, VideoFile
from hpdm.data.split_lists import ClassFolder, read_class_index, read_split
from hpdm.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES, listed
from hpdm.files import numbered_lines

Split = Literal["train", "test"]
"""A side of UCF-101's official splits."""
SPLIT_FOLDER = "ucfTrainTestlist"
# Files beside the clips that are not meant as clips, and so are no news when they are left out.
_SIDE_SUFFIXES = frozenset((".csv", ".json", ".jsonl", ".md", ".txt"))
# Folders of these names hold whole sets, whose folders are the classes.
_PARTS = frozenset(("dev", "eval", "test", "testing", "train", "training", "val", "valid", "validation"))


@dataclass(frozen=True, slots=True)
class Tree:
    """The videos below a folder, sorted: those directly in it, and those of each class folder.

    In a set of images, the images are what is called videos here.
    """

    root: Path
    flat: list[Path]
    folders: dict[str, list[Path]]
    """A class whose videos are all empty has an empty list."""
    empty: frozenset[Path]
    """Videos without a single byte, which are not among the others."""

    def videos(self) -> Iterator[Path]:
        """All videos, those without a byte last."""
        yield from self.flat
        for paths in self.folders.values():
            yield from paths
        yield from sorted(self.empty)

    def names(self) -> set[str]:
        """The path of every video relative to the root, with slashes."""
        return {path.relative_to(self.root).as_posix() for path in self.videos()}


def find_videos(
    root: str | os.PathLike[str], split_file: str | os.PathLike[str] | None = None
) -> tuple[list[str], list[VideoFile]]:
    """Class names (empty for a flat folder) and files of a set; :class:`~hpdm.data.clips.VideoDataset` has the layouts.

    Raises:
        FileNotFoundError: no such folder, split file or listed clip.
        ValueError: no videos and no images, videos both beside and inside class folders, a class that the set does not
            have.
    """
    report = Report()
    found = find_in_tree(read_tree(Path(root), report), split_file, report)
    return found.class_names, found.files


def read_tree(root: Path, report: Report) -> Tree:
    """The videos of a folder, or its images where it holds no video: beside videos, images are thumbnails.

    Args:
        root: the folder.
        report: receives what is left out.

    Raises:
        FileNotFoundError: no such folder.
    """
    beside_videos, beside_images = Report(), Report()
    tree = read_tree_of(root, VIDEO_SUFFIXES, beside_videos)
    images = None if tree.flat or tree.folders else read_tree_of(root, IMAGE_SUFFIXES, beside_images)
    has_images = images is not None and bool(images.flat or images.folders)
    for left_out in (beside_images if has_images else beside_videos).left_out():
        report.add(left_out)
    return images if images is not None and has_images else tree


def read_tree_of(root: Path, suffixes: Set[str], report: Report, ignore: Set[Path] = frozenset()) -> Tree:
    """The files of a kind: directly in a folder, and at any depth below the folders in it.

    Args:
        root: the folder.
        suffixes: those of the kind.
        report: receives what is left out.
        ignore: files that are something else, and are not left out.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    walk = _Walk(suffixes, report, ignore)
    flat, folders = walk.scan(root)
    by_class: dict[str, list[Path]] = {}
    for folder in folders:
        # A link may lead back to the root or to a folder above itself.
        seen, waiting, videos, empty_before = {_identity(root)}, [folder], list[Path](), len(walk.empty)
        while waiting:
            current = waiting.pop()
            if _identity(current) in seen:
                report.leave_out("folders that were read already, under another name", current)
                continue
            seen.add(_identity(current))
            direct, deeper = walk.scan(current)
            videos += direct
            waiting += reversed(deeper)
        if videos or len(walk.empty) > empty_before:
            by_class[folder.name] = sorted(videos, key=lambda path: path.parts)
        elif not _holds_lists(folder):
            report.leave_out("folders without videos", folder)
    return Tree(root, flat, by_class, frozenset(walk.empty))


class _Walk:
    """Sorts the entries of folders into videos, folders, and what is left out."""

    def __init__(self, suffixes: Set[str], report: Report, ignore: Set[Path]) -> None:
        self.suffixes, self.report, self.ignore = suffixes, report, ignore
        self.empty: set[Path] = set()

    def scan(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The videos and the folders directly in ``folder``, both sorted."""
        videos, folders = [], []
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            path, kind = folder / entry.name, _kind(entry)
            if kind == "folder" and entry.name.startswith("."):
                self.report.leave_out("hidden folders", path)
            elif kind == "folder":
                folders.append(path)
            elif path not in self.ignore and self._is_video(path, entry, kind):
                videos.append(path)
        return videos, folders

    def _is_video(self, path: Path, entry: os.DirEntry[str], kind: str) -> bool:
        suffix = path.suffix.lower()
        if suffix not in self.suffixes:
            if suffix not in _SIDE_SUFFIXES and not entry.name.startswith(".") and kind == "file":
                is_thumbnail = suffix in IMAGE_SUFFIXES and self.suffixes == VIDEO_SUFFIXES
                self.report.leave_out("images beside videos" if is_thumbnail else _name_of(suffix), path)
        elif kind != "file":
            self.report.leave_out("links that lead nowhere, and special files", path)
        elif entry.name.startswith("."):
            # A file being written, or one that a desktop environment left.
            self.report.leave_out("hidden files", path)
        elif entry.stat().st_size == 0:
            self.report.leave_out(EMPTY, path)
            self.empty.add(path)
        else:
            return True
        return False


def _kind(entry: os.DirEntry[str]) -> str:
    """What an entry is, or what it links to: "folder", "file" or "other"."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
    except OSError:
        return "other"  # a link to itself


def _name_of(suffix: str) -> str:
    """What files of a suffix are called in reports. Numbers at the end of names are not taken for suffixes."""
    if not suffix:
        return "files without a suffix"
    return f"files ending in {suffix}" if re.fullmatch(r"\.[0-9]?[a-z]\w{0,7}", suffix) else "files of other kinds"


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _holds_lists(folder: Path) -> bool:
    return (folder / "classInd.txt").is_file() or any(folder.glob("t*list0?.txt"))


def find_in_tree(tree: Tree, split_file: str | os.PathLike[str] | None, report: Report) -> Found:
    """The clips of a folder with their labels; arguments and errors as :func:`find_videos`."""
    root, flat, folders = tree.root, tree.flat, tree.folders
    if flat and folders:
        raise ValueError(
            f"root: {root} holds videos beside class folders ({', '.join(list(folders)[:3])}), expected one"
        )
    if not flat and not any(folders.values()):
        empty = f"; {len(tree.empty)} are empty" if tree.empty else ""
        raise ValueError(
            f"root: no videos in {root} or the folders in it, expected names ending in {listed(VIDEO_SUFFIXES)}, or "
            f"images alone ({listed(IMAGE_SUFFIXES)}){empty}"
        )
    if flat and split_file is not None:
        raise ValueError(f"split_file: {root} has no class folders, which a split needs")
    if flat:
        return Found([], [VideoFile(str(path), 0) for path in flat])
    lists = [Path(split_file).parent] if split_file is not None else split_folders(root)
    listing = next((path for folder in lists if (path := folder / "classInd.txt").is_file()), None)
    for name in folders:
        check_class_name(name, f"root: a folder in {root}")
    if listing is None and split_file is None:
        _check_depth(root, folders)
    names = read_class_index(listing) if listing is not None else list(folders)
    check_number(names, sum(map(len, folders.values())), listing or root)
    index = ClassIndex(names, listing or root)
    classes = index.find_folders(folders, root)
    unknown = [folder for folder, name in classes.items() if name is None]
    if unknown and split_file is None:
        raise ValueError(f"root: class folder {unknown[0]!r} is not in {listing}")
    report.notes += [
        f"class folder {folder!r} is read as class {name!r} of {listing}"
        for folder, name in classes.items()
        if name is not None and name != folder
    ]
    if split_file is not None:
        by_class = {
            name: ClassFolder(root / folder, folders[folder]) for folder, name in classes.items() if name is not None
        }
        return Found(names, _listed(tree, Path(split_file), index, by_class, report))
    labels = {folder: index.labels[name] for folder, name in classes.items() if name is not None}
    return Found(names, [VideoFile(str(path), labels[name]) for name, paths in folders.items() for path in paths])


def _listed(
    tree: Tree, split_file: Path, index: ClassIndex, folders: dict[str, ClassFolder], report: Report
) -> list[VideoFile]:
    """The clips that a split lists; those that it does not list are left out."""
    files = read_split(split_file, tree.root, index, folders, tree.empty, report)
    listed = {file.path for file in files}
    others = [path for paths in tree.folders.values() for path in paths if str(path) not in listed]
    for path in others:
        report.leave_out(f"clips that {split_file.name} does not list", path)
    return files


def _check_depth(root: Path, folders: dict[str, list[Path]]) -> None:
    """Checks that the folders are classes, not parts of a set or the whole set, whose folders are the classes.

    Raises:
        ValueError: a folder named as a part of a set, or the only folder, has its videos in folders of its own.
    """
    for name, paths in folders.items():
        is_suspect = len(folders) == 1 or name.lower() in _PARTS
        if is_suspect and paths and all(path.parent != root / name for path in paths):
            raise ValueError(
                f"root: no videos directly in {root / name}, but in folders below it ({paths[0].relative_to(root)}), "
                f"expected the folder whose folders are the classes, such as {root / name}"
            )


def split_folders(root: Path) -> list[Path]:
    """Where UCF-101's lists may lie."""
    return [root, root / SPLIT_FOLDER, root.parent / SPLIT_FOLDER]


def find_split_file(root: Path, split: Split, fold: int) -> Path:
    """The official list of a split, in ``root``, in ``root/ucfTrainTestlist`` or beside ``root``.

    Raises:
        FileNotFoundError: it is in none of them.
    """
    name = f"{split}list{fold:02d}.txt"
    for folder in split_folders(root):
        if (folder / name).is_file():
            return folder / name
    searched = ", ".join(str(folder) for folder in split_folders(root))
    raise FileNotFoundError(f"split: no {name} in {searched}")


def split_applies(root: Path, split: Split, fold: int = 1) -> bool:
    """Whether there is an official list of the split that names a clip of this folder.

    Lists that lie beside the folder may be those of another set beside it.
    """
    try:
        path = find_split_file(root, split, fold)
    except FileNotFoundError:
        return False
    folders = read_tree(root, Report()).folders
    stems = {f"{name}/{file.stem}" for name, files in folders.items() for file in files}
    return any(os.path.splitext(line.split()[0])[0] in stems for _, line in numbered_lines(path))
