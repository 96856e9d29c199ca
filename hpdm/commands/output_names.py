"""Names of the files that a command will write, checked before the work that makes their contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hpdm.files import check_not_a_file
from hpdm.printable import printable

# File systems take names of 255 bytes, and a file has a longer, temporary name while it is written.
MAX_BYTES = 255 - 32


def check_outputs(out: Path, names: Sequence[str]) -> None:
    """Checks that files of these names can be written into a folder, each beside the others.

    Args:
        out: the folder, which need not exist yet.
        names: of the files.

    Raises:
        FileExistsError: ``out`` is a file.
        ValueError: a name that leads out of the folder, is too long, or comes twice.
    """
    check_not_a_file("out", out)
    for name in names:
        if not name or "\0" in name or (out / name).parent != out or name in (".", ".."):
            raise ValueError(f"out: got the file name '{printable(name)}', expected one that lies in {out}")
        if len(name.encode(errors="surrogateescape")) > MAX_BYTES:
            raise ValueError(f"out: got the file name '{printable(name[:80])}...', expected at most {MAX_BYTES} bytes")
    name, count = Counter(names).most_common(1)[0] if names else ("", 0)
    if count > 1:
        raise ValueError(f"out: {count} videos would be called '{printable(name)}', expected different names")
