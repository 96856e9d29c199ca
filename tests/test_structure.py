"""Who imports whom: the layers of the two packages, read from the sources and held to by tests.

Every import counts: at the top of a file, inside of functions, and under ``TYPE_CHECKING``. Importing a module also
runs the ``__init__`` of its package; that is not counted as an import of the package.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hpdm", "hpdm_kernels")
# Op families, which share the files beside their folders and nothing else.
FAMILIES = tuple(
    f"hpdm_kernels.{name}" for name in ("context", "attention", "groupnorm", "patches", "tiles", "optimizer")
)
# Systems, and what serves every system and so knows none of them.
WINGS = ("hpdm.patch", "hpdm.latent")
SHARED = tuple(
    f"hpdm.{name}"
    for name in (
        "training", "data", "evaluation", "planning", "process", "solvers", "sampling", "text", "video", "files",
        "json_file", "tensor_file", "distributed",
    )
)  # fmt: skip
COMMANDS, ENTRY = "hpdm.commands", "hpdm.cli"
# Runs in processes of its own, which must start fast.
WORKER = "hpdm.data.decoding"
# What that worker may use: files that need the standard library alone.
LIGHT = ("hpdm.files", "hpdm.json_file")


@dataclass(frozen=True)
class Module:
    """A source file."""

    name: str
    is_package: bool
    imports: frozenset[str]
    """Names of the modules that it imports, those of the tree alone."""
    exports: Mapping[str, str]
    """Names bound by ``from ... import`` and the modules they come from."""


def within(name: str, package: str) -> bool:
    """Whether ``name`` is ``package`` or inside of it."""
    return name == package or name.startswith(package + ".")


def read_tree(root: Path) -> dict[str, Module]:
    """All modules of :data:`PACKAGES` under ``root``, by dotted name."""
    files = {path: path.relative_to(root).with_suffix("") for name in PACKAGES for path in (root / name).rglob("*.py")}
    names = {path: ".".join(p for p in relative.parts if p != "__init__") for path, relative in files.items()}
    known = set(names.values())
    modules = {}
    for path, name in names.items():
        is_package = path.name == "__init__.py"
        imported = list(_imported(ast.parse(path.read_text(encoding="utf-8")), name, is_package, known))
        targets = frozenset(target for target, _ in imported if target != name)
        exports = {bound: target for target, bound in imported if bound}
        modules[name] = Module(name, is_package, targets, exports)
    return modules


def _imported(tree: ast.AST, name: str, is_package: bool, known: set[str]) -> Iterator[tuple[str, str | None]]:
    """``(module, name bound by "from module import name" or None)`` for each import of a module of the tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from ((target, None) for target in _closest(alias.name, known))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                for target in _closest(f"{base}.{alias.name}", known):
                    yield target, alias.asname or alias.name


def _closest(name: str, known: set[str]) -> list[str]:
    """The module that ``name`` is, or that it is a part of; none if it is not of the tree."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return [name] if name else []


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that can reach each other, sorted."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += graph.get(node, ())
        return seen

    reached = {node: reach(node) for node in graph}
    groups = {tuple(sorted(n for n in reached[node] if node in reached.get(n, ()))) for node in graph}
    return [list(group) for group in sorted(groups) if group]


def folder(module: Module) -> str:
    """The package of a module; files directly in a top package stand for themselves."""
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    return module.name if package in PACKAGES else package


# ---- the rules: each returns what breaks it ----


def file_cycles(modules: Mapping[str, Module]) -> list[str]:
    """No files import each other in a circle."""
    return [" <-> ".join(group) for group in cycles({m.name: set(m.imports) for m in modules.values()})]


def folder_cycles(modules: Mapping[str, Module]) -> list[str]:
    """No folders import each other in a circle."""
    graph: dict[str, set[str]] = {}
    for module in modules.values():
        targets = {folder(modules[name]) for name in module.imports}
        graph.setdefault(folder(module), set()).update(targets - {folder(module)})
    return [" <-> ".join(group) for group in cycles(graph)]


def _forbidden(modules: Mapping[str, Module], importers: tuple[str, ...], imported: tuple[str, ...]) -> list[str]:
    return [
        f"{module.name} imports {target}"
        for module in modules.values()
        for target in sorted(module.imports)
        if any(within(module.name, name) for name in importers) and any(within(target, name) for name in imported)
    ]


def commands_are_on_top(modules: Mapping[str, Module]) -> list[str]:
    """Only the entry point imports commands, which may import each other's common parts."""
    allowed = {name for name in modules if name == ENTRY or within(name, COMMANDS)}
    return _forbidden({name: m for name, m in modules.items() if name not in allowed}, PACKAGES, (COMMANDS,))


def kernels_stand_alone(modules: Mapping[str, Module]) -> list[str]:
    """The kernels know nothing of the models."""
    return _forbidden(modules, ("hpdm_kernels",), ("hpdm",))


def op_families_stand_alone(modules: Mapping[str, Module]) -> list[str]:
    """Op families do not import each other."""
    return [
        line
        for family in FAMILIES
        for line in _forbidden(modules, (family,), tuple(other for other in FAMILIES if other != family))
    ]


def the_decode_worker_stands_alone(modules: Mapping[str, Module]) -> list[str]:
    """What decodes imports nothing of the packages but itself and what is light."""
    found = _forbidden(modules, (WORKER, *LIGHT), PACKAGES)
    return [
        line for line in found if line.rpartition(" ")[2] not in LIGHT and not within(line.rpartition(" ")[2], WORKER)
    ]


def shared_parts_know_no_system(modules: Mapping[str, Module]) -> list[str]:
    """What serves every system imports none."""
    return _forbidden(modules, SHARED, WINGS)


def no_name_is_a_module_and_something_else(modules: Mapping[str, Module]) -> list[str]:
    """A package exports nothing under the name of one of its modules."""
    return [
        f"{package.name}.{name} is a module and comes from {source}"
        for package in modules.values()
        for name, source in sorted(package.exports.items())
        if package.is_package and f"{package.name}.{name}" in modules and source != f"{package.name}.{name}"
    ]


RULES = (
    file_cycles, folder_cycles, commands_are_on_top, kernels_stand_alone, op_families_stand_alone,
    the_decode_worker_stands_alone, shared_parts_know_no_system, no_name_is_a_module_and_something_else,
)  # fmt: skip


@pytest.fixture(scope="module")
def tree():
    return read_tree(ROOT)


def test_the_whole_tree_is_read(tree):
    assert len(tree) > 80
    assert {ENTRY, WORKER, *FAMILIES, "hpdm.patch.model", "hpdm_kernels"} <= set(tree)
    assert "hpdm_kernels" in tree["hpdm.patch.model"].imports


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(tree, rule):
    found = rule(tree)
    assert not found, f"{rule.__doc__}\n  " + "\n  ".join(found)


# ---- the checker itself, on made-up trees ----

CLEAN = {
    "hpdm/__init__.py": "from hpdm.patch.model import HPDM\nfrom hpdm import process\n",
    "hpdm/process.py": "import torch\n",
    "hpdm/cli.py": "from hpdm.commands import train\n",
    "hpdm/commands/__init__.py": "",
    "hpdm/commands/common.py": "from hpdm.training.trainer import Trainer\n",
    "hpdm/commands/train.py": "from hpdm.commands.common import Trainer\nfrom hpdm.patch import model\n",
    "hpdm/data/__init__.py": "",
    "hpdm/data/decoding/__init__.py": "",
    "hpdm/data/decoding/scan.py": "import numpy\n",
    "hpdm/data/decoding/server.py": "import sys\nfrom hpdm.data.decoding.scan import scan\n",
    "hpdm/data/clips.py": "from . import layout\nfrom .layout import find\n",
    "hpdm/data/layout.py": "",
    "hpdm/patch/__init__.py": "",
    "hpdm/patch/model.py": "import hpdm_kernels\nfrom hpdm.process import Process\n",
    "hpdm/training/__init__.py": "",
    "hpdm/training/trainer.py": "from ..data.clips import find\nfrom hpdm import process\n",
    "hpdm_kernels/__init__.py": "from hpdm_kernels.tiles.api import average_tiles\n",
    "hpdm_kernels/boxes.py": "",
    "hpdm_kernels/context/__init__.py": "",
    "hpdm_kernels/context/api.py": "from hpdm_kernels import boxes\n",
    "hpdm_kernels/tiles/__init__.py": "",
    "hpdm_kernels/tiles/api.py": "from hpdm_kernels.boxes import check\n",
}


def make_tree(folder: Path, changes: Mapping[str, str]) -> dict[str, Module]:
    """The clean tree with some files added to or replaced."""
    for name, text in (CLEAN | {name: CLEAN.get(name, "") + text for name, text in changes.items()}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_tree(folder)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_clean_tree_passes(tmp_path, rule):
    assert rule(make_tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("rule", "changes", "found"),
    [
        (
            file_cycles, {"hpdm/data/layout.py": "def f():\n    from hpdm.data.clips import find\n"},
            ["hpdm.data.clips <-> hpdm.data.layout"],
        ),
        (
            file_cycles,
            {"hpdm/data/layout.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import clips\n"},
            ["hpdm.data.clips <-> hpdm.data.layout"],
        ),
        (
            file_cycles, {"hpdm/process.py": "from hpdm import HPDM\n"},
            ["hpdm <-> hpdm.patch.model <-> hpdm.process"],
        ),
        (
            folder_cycles, {"hpdm/data/layout.py": "import hpdm.training\n"},
            ["hpdm.data <-> hpdm.training"],
        ),
        (
            folder_cycles, {"hpdm/process.py": "from hpdm.training import seed\n"},
            ["hpdm.process <-> hpdm.training"],
        ),
        (
            commands_are_on_top, {"hpdm/training/trainer.py": "import hpdm.commands.common as c\n"},
            ["hpdm.training.trainer imports hpdm.commands.common"],
        ),
        (
            commands_are_on_top, {"hpdm/__init__.py": "from .commands.train import Trainer\n"},
            ["hpdm imports hpdm.commands.train"],
        ),
        (
            kernels_stand_alone, {"hpdm_kernels/tiles/api.py": "def f():\n    import hpdm.process\n"},
            ["hpdm_kernels.tiles.api imports hpdm.process"],
        ),
        (
            op_families_stand_alone, {"hpdm_kernels/tiles/api.py": "from ..context.api import sample\n"},
            ["hpdm_kernels.tiles.api imports hpdm_kernels.context.api"],
        ),
        (
            the_decode_worker_stands_alone, {"hpdm/data/decoding/scan.py": "from ..layout import find\n"},
            ["hpdm.data.decoding.scan imports hpdm.data.layout"],
        ),
        (
            shared_parts_know_no_system, {"hpdm/training/trainer.py": "from hpdm.patch.model import HPDM\n"},
            ["hpdm.training.trainer imports hpdm.patch.model"],
        ),
        (
            shared_parts_know_no_system,
            {"hpdm/latent/__init__.py": "", "hpdm/process.py": "def f():\n    import hpdm.latent\n"},
            ["hpdm.process imports hpdm.latent"],
        ),
        (
            no_name_is_a_module_and_something_else, {"hpdm_kernels/average_tiles.py": ""},
            ["hpdm_kernels.average_tiles is a module and comes from hpdm_kernels.tiles.api"],
        ),
    ],
)  # fmt: skip
def test_what_breaks_a_rule_is_found(tmp_path, rule, changes, found):
    assert rule(make_tree(tmp_path, changes)) == found
