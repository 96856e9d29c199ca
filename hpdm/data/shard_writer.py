"""Packing a folder of videos into tar shards, in the layout that :mod:`hpdm.data.shards` reads."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from hpdm.data.found import VideoFile
from hpdm.data.shard_labels import CLASSES_FILE
from hpdm.files import atomic_folder, check_not_a_file, write_text


def write_shards(
    out: str | os.PathLike[str],
    root: str | os.PathLike[str],
    class_names: Sequence[str],
    files: Sequence[VideoFile],
    clips_per_shard: int,
) -> list[Path]:
    """Packs the videos of a folder, unchanged, into ``out/shard-000000.tar`` and so on, atomically.

    A clip's key is its path relative to ``root`` without the suffix, with ``_`` for each dot in its name. The same
    files in the same order give the same shards, byte for byte.

    Args:
        out: folder to create, or an empty one.
        root: the folder that the files lie in.
        class_names: names for ``classes.json``, none for a set without labels.
        files: clips with labels and captions (``""`` for none).
        clips_per_shard: >= 1.

    Returns:
        The paths of the shards.

    Raises:
        ValueError: ``clips_per_shard`` below 1, or two files of one key.
        FileExistsError: ``out`` is a file, or is not empty.
        FileNotFoundError: the folder that is to hold ``out`` does not exist.
    """
    if clips_per_shard < 1:
        raise ValueError(f"clips_per_shard: got {clips_per_shard}, expected >= 1")
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
    names: list[str] = []
    with atomic_folder(out) as temporary:
        for first in tqdm(range(0, len(clips), clips_per_shard), desc="shards", unit="shard", delay=2, leave=False):
            names.append(f"shard-{len(names):06d}.tar")
            with tarfile.open(temporary / names[-1], "w") as tar:
                for key, file in clips[first : first + clips_per_shard]:
                    _add_clip(tar, key, file, labeled=bool(class_names))
        if class_names:
            write_text(temporary / CLASSES_FILE, json.dumps(list(class_names), indent=1) + "\n")
    return [out / name for name in names]


def _key(path: Path) -> str:
    return (path.parent / path.stem.replace(".", "_")).as_posix()


def _add_clip(tar: tarfile.TarFile, key: str, file: VideoFile, *, labeled: bool) -> None:
    """Adds the members of one clip: the video, the label if the set has labels, the caption if there is one."""

    def add(suffix: str, size: int, content: IO[bytes]) -> None:
        member = tarfile.TarInfo(f"{key}{suffix}")
        member.size = size
        tar.addfile(member, content)

    with open(file.path, "rb") as video:
        add(Path(file.path).suffix.lower(), os.fstat(video.fileno()).st_size, video)
    for suffix, text in ((".cls", str(file.label) if labeled else ""), (".txt", file.caption)):
        if text:
            add(suffix, len(text.encode()), io.BytesIO(text.encode()))
