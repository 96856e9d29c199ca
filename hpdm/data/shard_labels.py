"""Classes of a set of shards: their names, from a file beside the shards or from the members, and each clip's label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpdm.data.class_names import MOST_WITHOUT_CLIPS, check_class_name, check_number
from hpdm.data.shard_index import Entry
from hpdm.data.split_lists import read_class_index
from hpdm.json_file import read_json

CLASSES_FILE = "classes.json"


def listed_classes(paths: Sequence[Path]) -> list[str] | None:
    """The class names in the files beside the shards; ``None`` where there are no such files.

    Raises:
        ValueError: a damaged file, an unsafe name, or folders whose files differ.
    """
    by_file: dict[Path, list[str]] = {}
    for folder in dict.fromkeys(path.parent for path in paths):
        if (folder / CLASSES_FILE).is_file():
            by_file[folder / CLASSES_FILE] = _read_classes(folder / CLASSES_FILE)
        elif (folder / "classInd.txt").is_file():
            by_file[folder / "classInd.txt"] = read_class_index(folder / "classInd.txt")
    if not by_file:
        return None
    (first, names), *others = by_file.items()
    for file, other in others:
        if other != names:
            raise ValueError(f"root: {file} and {first} list different classes")
    return names


def _read_classes(path: Path) -> list[str]:
    names = read_json(path, list[Any])
    if len({*map(repr, names)}) < len(names):
        raise ValueError(f"{path}: got a class twice, expected a list of different names, in the order of their labels")
    return [check_class_name(name, f"{path}: class {label}") for label, name in enumerate(names)]


def assign_labels(names: list[str] | None, entries: list[tuple[Path, Entry]]) -> tuple[list[str], list[int]]:
    """All class names and the label of each clip; no names and labels of 0 for a set without labels.

    Args:
        names: the listed classes; ``None`` where no file lists them.
        entries: each clip and its shard.

    Raises:
        ValueError: clips with and without labels, labels and class names that contradict each other or the list, or
            an unsafe name.
    """
    unlabeled = [entry.label is None and entry.class_name is None for _, entry in entries]
    if names is None and all(unlabeled):
        return [], [0] * len(entries)
    if any(unlabeled):
        path, entry = entries[unlabeled.index(True)]
        raise ValueError(f"{path}/{entry.name}: no label ({sum(unlabeled)} of {len(entries)} clips have none)")
    if names is None:
        names = _named_classes(entries)
    check_number(names, len(entries), "root")
    numbers = {name: label for label, name in enumerate(names)}
    labels = []
    for path, entry in entries:
        label = entry.label if entry.class_name is None else numbers.get(entry.class_name)
        if label is None or label >= len(names):
            got = f"class {entry.class_name!r}" if label is None else f"label {label}"
            raise ValueError(f"{path}/{entry.name}: {got} is not one of the {len(names)} classes")
        if entry.label is not None and entry.label != label:
            raise ValueError(
                f"{path}/{entry.name}: got label {entry.label} for class {entry.class_name!r}, expected {label}"
            )
        labels.append(label)
    return names, labels


def _named_classes(entries: list[tuple[Path, Entry]]) -> list[str]:
    """Class names from the members of the shards; a label without a name is named by its number."""
    if all(entry.label is None for _, entry in entries):
        return sorted({entry.class_name for _, entry in entries if entry.class_name is not None})
    most = max(MOST_WITHOUT_CLIPS, len(entries))
    names: dict[int, str] = {}
    for path, entry in entries:
        if entry.label is None:
            continue
        if entry.label >= most:
            raise ValueError(
                f"{path}/{entry.name}: got label {entry.label}, expected less than {most}, the most for "
                f"{len(entries)} clips without a {CLASSES_FILE} beside the shards"
            )
        names.setdefault(entry.label, str(entry.label) if entry.class_name is None else entry.class_name)
    return [names.get(label, str(label)) for label in range(max(names) + 1)]
