"""Scans kept on disk, so that a file is decoded from end to end once and not by every process of every run.

A scan is a small JSON file in the user's cache folder, ``$HPDM_CACHE/scans`` or ``~/.cache/hpdm/scans``, named by what
the scan depends on: the video's bytes (its length, three samples and the file's time of modification), the place of a
member in its archive, and the versions of the decoder and of this format. Names do not count, so a set may move. Where
the folder cannot be written, scans are kept in memory alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpdm.data.decoding.scan import Scan
from hpdm.files import atomic_path
from hpdm.json_file import read_json

_VERSION = 1
_MOST_BYTES = 64 << 20  # of a scan: those of a video of a million frames are half as large
_SAMPLE = 1 << 16  # bytes at the start, in the middle and at the end


def folder() -> Path:
    """Where scans are kept.

    Raises:
        OSError: the user has no home folder, and nothing else names one.
    """
    base = os.environ.get("HPDM_CACHE")
    if base:
        return Path(base) / "scans"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpdm" / "scans"
    except RuntimeError as error:  # as in a container that runs under a number without a name
        raise OSError(str(error)) from None


def fingerprint(request: dict[str, Any]) -> str:
    """A name for what a request's scan depends on.

    Raises:
        OSError: the file cannot be read.
    """
    import av

    with open(request["path"], "rb") as file:
        stat = os.fstat(file.fileno())
        start, end = request.get("start", 0), request.get("end", stat.st_size)
        versions = [_VERSION, av.__version__, av.library_versions["libavcodec"], av.library_versions["libavformat"]]
        digest = hashlib.sha256(json.dumps([*versions, stat.st_mtime_ns, end - start, "start" in request]).encode())
        for at in (start, max(start, (start + end - _SAMPLE) // 2), max(start, end - _SAMPLE)):
            file.seek(at)
            digest.update(file.read(min(_SAMPLE, end - at)))
    return digest.hexdigest()


def load(name: str) -> Scan | None:
    """The scan of that name; ``None`` where there is none, or none that is whole."""
    try:
        scan: Scan = read_json(_path(name), Scan, _MOST_BYTES)
    except (OSError, ValueError):
        return None
    return scan if scan.frames and len(scan.pts) == scan.frames else None


def save(name: str, scan: Scan) -> None:
    """Keeps a scan, if the folder can be written."""
    with suppress(OSError):
        path = _path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One that a power cut damages is made again, so it need not be on the disk before the next one.
        with atomic_path(path, flush=False) as temporary:
            temporary.write_text(json.dumps(asdict(scan), separators=(",", ":")), encoding="utf-8")


def _path(name: str) -> Path:
    return folder() / name[:2] / f"{name[2:]}.json"
