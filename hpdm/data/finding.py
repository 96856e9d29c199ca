"""The clips of a set, whether it is a folder of videos or tar shards, and what of the set is left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpdm.data.captions import add_captions
from hpdm.data.found import Found, Report, VideoFile
from hpdm.data.layout import Split, find_in_tree, find_split_file, read_tree, read_tree_of
from hpdm.data.shards import find_shards, read_shards
from hpdm.data.suffixes import VIDEO_SUFFIXES


def find_clips(
    root: str | os.PathLike[str],
    *,
    split: Split | None = None,
    fold: int = 1,
    split_file: str | os.PathLike[str] | None = None,
    captions: bool = False,
) -> tuple[list[str], list[VideoFile]]:
    """Class names (empty for none) and clips of a set; as :func:`survey`, without what was left out."""
    found = survey(root, split=split, fold=fold, split_file=split_file, captions=captions)
    return found.class_names, found.files


def survey(
    root: str | os.PathLike[str],
    *,
    split: Split | None = None,
    fold: int = 1,
    split_file: str | os.PathLike[str] | None = None,
    captions: bool = False,
) -> Found:
    """The clips of a folder or of shards, their classes, and what was left out; no video is opened.

    With ``captions``, a clip without one has the caption ``""``; else all captions are ``""``.

    Arguments and errors are those of :class:`hpdm.data.clips.VideoDataset`.
    """
    report = Report()
    shards = find_shards(root)
    if shards is None:
        tree = read_tree(Path(root), report)
        listing = find_split_file(Path(root), split, fold) if split is not None else split_file
        found = find_in_tree(tree, listing, report)
        if captions:
            found = replace(found, files=add_captions(root, found.files, tree.names(), report))
    else:
        if split is not None or split_file is not None:
            raise ValueError(
                f"split: got one for shards ({root}), which have none; name its shards, as in 'train-*.tar'"
            )
        _check_beside(root, shards, report)
        found = read_shards(shards, report)
        if not captions:
            found = replace(found, files=[replace(file, caption="") for file in found.files])
    for label in sorted(set(range(len(found.class_names))) - {file.label for file in found.files}):
        report.leave_out("classes without clips", repr(found.class_names[label]))
    return replace(found, left_out=report.left_out(), notes=tuple(report.notes))


def _check_beside(root: str | os.PathLike[str], shards: Sequence[Path], report: Report) -> None:
    """Reports what lies in a folder of shards and is not read.

    Raises:
        ValueError: the folder holds videos as well.
    """
    if not os.path.isdir(root):
        return
    tree = read_tree_of(Path(root), VIDEO_SUFFIXES, report, frozenset(shards))
    if tree.flat or tree.folders:
        raise ValueError(f"root: {root} holds videos beside shards ({shards[0].name}), expected one")
