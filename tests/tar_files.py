"""Tar files with members of any kind, for tests of what is read from them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

Member = tuple[Any, ...]
"""``(name, contents)``, text or bytes; or ``(name, type, target)`` for a link or a device."""


def pack(path: Path, *members: Member, **options: Any) -> Path:
    """Writes a tar of these members and returns its path; ``options`` are those of ``tarfile.open``."""
    with tarfile.open(path, "w", **options) as out:
        for name, *rest in members:
            member = tarfile.TarInfo(name)
            if len(rest) == 1:
                content = rest[0].encode() if isinstance(rest[0], str) else rest[0]
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = rest
                out.addfile(member)
    return path
