"""Names of classes: which ones are safe, and how one is found in a list that spells it in another way.

A class name becomes part of file names (:func:`hpdm.printable.as_file_name`) and of lines on a terminal, and it comes
from files that other people wrote.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from hpdm.printable import printable

MAX_BYTES = 200
"""Longest name in UTF-8. File systems allow 255 bytes, of which a sample's seed and level need some."""
MOST_WITHOUT_CLIPS = 10_000
"""Number of classes that a set of any size may have; with more clips, as many as clips."""


def check_class_name(name: object, place: object) -> str:
    """Returns ``name`` if it can be shown, and be part of a file's name once slashes are escaped.

    Args:
        name: the name as it was read.
        place: where it was read, for the message: a file and its line, a shard and its member, or a folder.

    Raises:
        ValueError: the name is no text, is empty, ``.`` or ``..``, is longer than 200 bytes, or holds a control
            character or bytes that are not UTF-8.
    """
    if not isinstance(name, str):
        raise ValueError(f"{place}: got {name!r}, expected the name of a class as text")
    shown = printable(name[:80]) + ("..." if len(name) > 80 else "")
    if not name.strip() or name in (".", ".."):
        raise ValueError(f"{place}: got class name '{shown}', expected a name that can be part of a file's name")
    if printable(name) != name:
        raise ValueError(f"{place}: got class name '{shown}', expected UTF-8 without control characters")
    size = len(name.encode())
    if size > MAX_BYTES:
        raise ValueError(f"{place}: got class name '{shown}' of {size} bytes, expected at most {MAX_BYTES}")
    return name


def check_number(names: Sequence[str], clips: int, place: object) -> Sequence[str]:
    """Returns the classes of a set if there are not many more of them than clips: each needs memory in a model.

    Raises:
        ValueError: more than 10,000, and more than clips.
    """
    if len(names) > max(MOST_WITHOUT_CLIPS, clips):
        raise ValueError(f"{place}: got {len(names)} classes for {clips} clips, expected at most {MOST_WITHOUT_CLIPS}")
    return names


class ClassIndex:
    """Finds classes by name: by the exact name, else by the only name that differs in case or in the form of accents.

    UCF-101 needs it: its list and its archive say ``HandstandPushups``, many copies on disk ``HandStandPushups``.

    Args:
        names: the names of the classes, in the order of their labels.
        source: what lists them, for messages.
    """

    def __init__(self, names: Sequence[str], source: object) -> None:
        self.source = source
        self.labels = {name: label for label, name in enumerate(names)}
        self._similar: dict[str, list[str]] = {}
        for name in names:
            self._similar.setdefault(fold(name), []).append(name)

    def find(self, name: str, place: object) -> str | None:
        """The class that ``name`` stands for, in the index's spelling; ``None`` if there is none.

        Raises:
            ValueError: it differs only in case from several classes.
        """
        if name in self.labels:
            return name
        similar = self._similar.get(fold(name), [])
        if len(similar) > 1:
            raise ValueError(
                f"{place}: class {name!r} may be {similar[0]!r} or {similar[1]!r} of {self.source}, expected the "
                "exact spelling of one"
            )
        return similar[0] if similar else None

    def find_folders(self, folders: Iterable[str], root: object) -> dict[str, str | None]:
        """The class of each class folder; ``None`` for a folder that is not in the index.

        Raises:
            ValueError: two folders stand for one class, or a folder may stand for several.
        """
        classes: dict[str, str | None] = {}
        folder_of: dict[str, str] = {}
        for folder in folders:
            name = self.find(folder, f"root: {root}")
            if name is not None and name in folder_of:
                raise ValueError(
                    f"root: {root} has class folders {folder_of[name]!r} and {folder!r}, which both stand for "
                    f"{name!r} of {self.source}, expected one of them"
                )
            classes[folder] = name
            if name is not None:
                folder_of[name] = folder
        return classes


def fold(name: str) -> str:
    """The name without what file systems and copies change: case, and the composition of accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
