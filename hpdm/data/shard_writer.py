"""Packing a folder of videos into tar shards, in the layout that :mod:`hpdm.data.shards` reads."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from hpdm.data.decode import DecodeError
from hpdm.data.found import VideoFile
from hpdm.data.reencode import reencode
from hpdm.data.shard_labels import CLASSES_FILE
from hpdm.files import atomic_folder, check_not_a_file, write_text

log = logging.getLogger(__name__)

Clip = tuple[str, VideoFile]
"""A clip of the folder and its key in the shards."""


def write_shards(
    out: str | os.PathLike[str],
    root: str | os.PathLike[str],
    class_names: Sequence[str],
    files: Sequence[VideoFile],
    clips_per_shard: int,
    resize: int | None = None,
) -> list[Path]:
    """Packs the videos of a folder into ``out/shard-000000.tar`` and so on, atomically.

    A clip's key is its path relative to ``root`` without the suffix, with ``_`` for each dot in its name. The same
    files in the same order give the same shards, byte for byte.

    Args:
        out: folder to create, or an empty one.
        root: the folder that the files lie in.
        class_names: names for ``classes.json``, none for a set without labels.
        files: clips with labels and captions (``""`` for none).
        clips_per_shard: >= 1.
        resize: pixels of the shorter side, >= 16, to which videos are encoded anew (:mod:`hpdm.data.reencode`); a clip
            that is damaged anywhere is then left out, and the log names it. ``None`` packs videos unchanged.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: ``clips_per_shard`` below 1, ``resize`` below 16, two files of one key, or no clip that can be read.
        FileExistsError: ``out`` is a file, or is not empty.
        FileNotFoundError: the folder that is to hold ``out`` does not exist.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard: got {clips_per_shard}, expected >= 1")
    if resize is not None and resize < 16:
        raise ValueError(f"resize: got {resize}, expected at least 16")
    out, root = Path(out), Path(root)
    check_not_a_file("out", out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"out: {out} is not empty; choose another folder")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"out: folder {out.absolute().parent} does not exist")
    keys = [_key(Path(file.path).relative_to(root)) for file in files]
    key, count = Counter(keys).most_common(1)[0]
    if count > 1:
        same = [file.path for other, file in zip(keys, files) if other == key]
        raise ValueError(f"root: {same[0]} and {same[1]} both have the key {key!r}, expected different names")
    clips = list(zip(keys, files))
    with atomic_folder(out) as temporary:
        names = _write(temporary, clips, clips_per_shard, resize, labeled=bool(class_names))
        if class_names:
            write_text(temporary / CLASSES_FILE, json.dumps(list(class_names), indent=1) + "\n")
    return [out / name for name in names]


def _write(
    folder: Path, clips: Sequence[Clip], clips_per_shard: int, resize: int | None, *, labeled: bool
) -> list[str]:
    """Writes the shards into a folder and returns their names."""
    names: list[str] = []
    videos = _unchanged(clips) if resize is None else _reencoded(clips, folder / ".clip.mp4", resize)
    for first in videos:
        names.append(f"shard-{len(names):06d}.tar")
        with tarfile.open(folder / names[-1], "w") as tar:
            for (key, file), video in itertools.chain([first], itertools.islice(videos, clips_per_shard - 1)):
                _add_clip(tar, key, file, video, labeled=labeled)
    return names


def _unchanged(clips: Sequence[Clip]) -> Iterator[tuple[Clip, Path]]:
    """Each clip and its video."""
    for clip in tqdm(clips, desc="clips", unit="clip", delay=2, leave=False):
        yield clip, Path(clip[1].path)


def _reencoded(clips: Sequence[Clip], path: Path, side: int) -> Iterator[tuple[Clip, Path]]:
    """Each good clip and its video encoded anew at ``path``, where the next one replaces it.

    Raises:
        ValueError: there is none.
    """
    reasons = []
    for clip in tqdm(clips, desc="clips", unit="clip", delay=2, leave=False):
        try:
            reencode(clip[1].source, path, side)
        except (DecodeError, FileNotFoundError) as error:
            reasons.append(str(error))
            log.warning("clip left out: %s", error)
            continue
        yield clip, path
    path.unlink(missing_ok=True)
    if len(reasons) == len(clips):
        raise ValueError(f"root: none of the {len(clips)} clips can be read; the first: {reasons[0]}")


def _key(path: Path) -> str:
    return (path.parent / path.stem.replace(".", "_")).as_posix()


def _add_clip(tar: tarfile.TarFile, key: str, file: VideoFile, path: Path, *, labeled: bool) -> None:
    """Adds the members of one clip: the video, the label if the set has labels, the caption if there is one."""

    def add(suffix: str, size: int, content: IO[bytes]) -> None:
        member = tarfile.TarInfo(f"{key}{suffix}")
        member.size = size
        tar.addfile(member, content)

    with open(path, "rb") as video:
        add(path.suffix.lower(), os.fstat(video.fileno()).st_size, video)
    for suffix, text in ((".cls", str(file.label) if labeled else ""), (".txt", file.caption)):
        if text:
            add(suffix, len(text.encode()), io.BytesIO(text.encode()))
