"""Tables of evaluations: cells that are kept as they are finished, columns by metric, and the files of a whole table.

``OUT/cells/NAME.json`` has the result of one row and everything that it depends on. An interrupted table goes on with
the first row that has no file; ``OUT/table.json`` and ``OUT/table.md`` are written when all rows are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from hpdm import distributed
from hpdm.files import make_folder, write_json, write_text
from hpdm.json_file import read_json
from hpdm.sampling import AXES

MOTION_COLUMNS = ("motion_right", "shape_overlap", "color_right", "texture")
"""The scores of the metric motion that a table shows; all are in the cells."""

Value = float | None


class _Cell(TypedDict):
    """The file of a finished row."""

    settings: dict[str, Any]
    result: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of a table: one metric, a row per setting."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[Value]]
    """Values by the name of the row, one per column; ``None`` for none."""

    def markdown(self) -> str:
        """The section as a table in Markdown, under its title."""
        lines = [
            f"**{self.title}**",
            "",
            f"| | {' | '.join(self.columns)} |",
            "|---" + "|---:" * len(self.columns) + "|",
        ]
        lines += [f"| {name} | {' | '.join(map(_text, values))} |" for name, values in self.rows.items()]
        return "\n".join(lines)


class Cells:
    """The finished rows of a table in a folder. A collective: every rank makes the same calls.

    Args:
        out: folder of the table.

    Raises:
        FileExistsError: ``out`` is a file.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        with distributed.raise_on_all_ranks():
            if distributed.is_first():
                make_folder("out", out / "cells")

    def get(self, name: str, settings: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of a row: from its file, or computed and kept.

        Args:
            name: of the row, and of its file.
            settings: everything that the result depends on, as JSON values.
            compute: returns the result, as JSON values. A collective.

        Raises:
            ValueError: the row was computed with other settings; the message names them.
        """
        path = self.out / "cells" / f"{name}.json"
        settings = json.loads(json.dumps(settings, default=str))
        stored = None
        with distributed.raise_on_all_ranks():
            if distributed.is_first() and path.is_file():
                stored = read_json(path, _Cell)
                changed = _changes(stored["settings"], settings)
                if changed:
                    raise ValueError(
                        f"out: {path} was computed with other settings ({changed}); choose another folder, or delete it"
                    )
        stored = distributed.broadcast(stored)
        if stored is not None:
            return stored["result"]
        result = compute()
        with distributed.raise_on_all_ranks():
            if distributed.is_first():
                write_json(path, {"settings": settings, "result": result})
        return json.loads(json.dumps(result))


def sections_of(results: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """The metrics of evaluations as sections, a row per evaluation, a column per level (and score).

    Args:
        results: by the name of the row, what :func:`hpdm.commands.evaluate.evaluate` returns for the same metrics;
            those of videos in ``levels``. A row may lack levels that another one has.
    """
    first = next(iter(results.values()))
    sections = []
    if "error" in first:
        columns = tuple(name.replace("_", " ") for name in first["losses"])
        rows = {name: [_mean(row) for row in result["error"]] for name, result in results.items()}
        sections.append(Section(f"error of v, {first['clips']} clips", columns, rows))
    by_level = {name: {part["level"]: part for part in result.get("levels", [])} for name, result in results.items()}
    some = {number: part for parts in by_level.values() for number, part in parts.items()}
    levels = {number: some[number] for number in sorted(some)}
    if levels:
        sections += _distribution_sections(levels, by_level) + _motion_sections(levels, by_level)
    seams = {name: _seams(result) for name, result in results.items()}
    axes = tuple(axis for axis in AXES if any(axis in energies for energies in seams.values()))
    if axes:
        rows = {name: [energies.get(axis) for axis in axes] for name, energies in seams.items()}
        sections.append(Section("gradient energy across tile borders / inside, last level", axes, rows))
    return sections


Levels = Mapping[int, Mapping[str, Any]]
"""Results of an evaluation by level."""


def _distribution_sections(levels: Levels, by_level: Mapping[str, Levels]) -> list[Section]:
    """FVD, KVD and Inception score, where they were measured."""
    about = next(iter(levels.values())).get("distribution", {})
    return [
        Section(
            f"{title}, {about['generated']} videos",
            tuple(_size(part) for part in levels.values()),
            {
                name: [parts[n]["distribution"][metric][key] if n in parts else None for n in levels]
                for name, parts in by_level.items()
            },
        )
        for metric, key, title in (("fvd", "value", "FVD"), ("kvd", "value", "KVD"), ("is", "mean", "Inception score"))
        if metric in about
    ]


def _motion_sections(levels: Levels, by_level: Mapping[str, Levels]) -> list[Section]:
    """The scores of motion, and those of the real clips, where they were measured."""
    about = next(iter(levels.values())).get("motion")
    if about is None:
        return []
    columns = tuple(f"{key.replace('_', ' ')}, {_size(part)}" for part in levels.values() for key in MOTION_COLUMNS)

    def row(parts: Levels, side: str) -> list[Value]:
        return [parts[n]["motion"][side][key] if n in parts else None for n in levels for key in MOTION_COLUMNS]

    rows = {name: row(parts, "generated") for name, parts in by_level.items()}
    rows["real clips"] = row(levels, "real")
    return [Section(f"motion, {about['generated']['clips']} videos", columns, rows)]


def _size(part: Mapping[str, Any]) -> str:
    return "x".join(map(str, part["size"]))


def _seams(result: Mapping[str, Any]) -> dict[str, float]:
    """The seam energies of an evaluation's last level, by axis; empty if it has none."""
    parts = [part.get(metric, {}) for part in result.get("levels", []) for metric in ("distribution", "motion")]
    return next((part["seams"] for part in parts if "seams" in part), {})


def write_table(out: Path, title: str, sections: Sequence[Section], settings: Mapping[str, Any]) -> str:
    """Writes ``table.json`` and ``table.md`` into ``out``, each as a whole, on rank 0; returns the Markdown.

    Args:
        out: folder of the table.
        title: first line.
        sections: parts of the table.
        settings: what all rows have in common.
    """
    parts = [{"title": s.title, "columns": list(s.columns), "rows": {n: list(v) for n, v in s.rows.items()}}
             for s in sections]  # fmt: skip
    text = "\n\n".join([f"# {title}", *(section.markdown() for section in sections)]) + "\n"
    with distributed.raise_on_all_ranks():
        if distributed.is_first():
            write_json(out / "table.json", {"title": title, "settings": dict(settings), "sections": parts})
            write_text(out / "table.md", text)
    return text


def _mean(row: Sequence[Value]) -> Value:
    """The mean over ranges of times; ``None`` where one of them has no error."""
    values = [value for value in row if value is not None]
    return sum(values) / len(row) if len(values) == len(row) else None


def _text(value: Value) -> str:
    """A number with two decimals, and at least four digits that count."""
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 100 else f"{value:#.4g}"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return ", ".join(f"{name}: {before.get(name)} -> {now.get(name)}" for name in names)
