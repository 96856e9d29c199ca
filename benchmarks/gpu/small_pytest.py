"""Runs one file of tests with pytest, or on machines that have none with the little of it that these files use.

``python -m benchmarks.gpu.small_pytest FILE [-k WORD] [--results FILE] [--seconds S]``. The stand-in knows
``parametrize``, ``skipif``, ``fixture``, ``param``, ``skip``, ``importorskip``, ``raises``, ``request`` and
``tmp_path``; a test that wants another fixture fails and says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import re
import shutil
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Skipped(BaseException):
    """As pytest's: no ``except Exception`` catches it."""


class Mark:
    """``pytest.mark``: what decorators note is kept on the function."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def mark(*arguments: Any, **named: Any) -> Any:
            def note(fn: Any) -> Any:
                fn.marks = [*getattr(fn, "marks", []), note]
                return fn

            note.mark = (name, arguments, named)  # type: ignore[attr-defined]
            bare = len(arguments) == 1 and not named and inspect.isfunction(arguments[0])
            return note(arguments[0]) if bare and name != "parametrize" else note

        return mark


class Param:
    """``pytest.param``."""

    def __init__(self, *values: Any, id: str | None = None, marks: Any = ()) -> None:
        self.values, self.id = values, id
        self.marks = list(marks) if isinstance(marks, (list, tuple)) else [marks]


class StashKey:
    """``pytest.StashKey[T]()``."""

    def __class_getitem__(cls, _: Any) -> type[StashKey]:
        return cls


def fixture(fn: Any = None, *, scope: str = "function", autouse: bool = False) -> Any:
    if fn is None:
        return lambda f: fixture(f, scope=scope, autouse=autouse)
    fn.fixture_of_tests = (scope, autouse)
    return fn


def skip(reason: str = "") -> None:
    raise Skipped(reason)


def importorskip(name: str, minversion: str | None = None, reason: str | None = None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(reason or str(error)) from None


@contextlib.contextmanager
def raises(expected: Any, match: str | None = None) -> Iterator[None]:
    try:
        yield
    except expected as error:
        if match is not None and not re.search(match, str(error)):
            raise AssertionError(f"raised {error!r}, expected a message like {match!r}") from error
    else:
        raise AssertionError(f"nothing was raised, expected {expected}")


def stand_in() -> types.ModuleType:
    """A module to be imported as ``pytest``."""
    module: Any = types.ModuleType("pytest")
    module.mark, module.param, module.fixture, module.StashKey = Mark(), Param, fixture, StashKey
    module.skip, module.importorskip, module.raises = skip, importorskip, raises
    module.hookimpl = lambda **_: lambda fn: fn
    return module


class Config:
    """What the fixtures ask pytest's configuration for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.stash: dict[Any, Any] = {}
        self.pluginmanager = types.SimpleNamespace(hasplugin=lambda name: False)
        self.option = types.SimpleNamespace()
        self._options = options

    def getoption(self, name: str) -> Any:
        return getattr(self._options, name.lstrip("-").replace("-", "_"))


def _name(value: Any, ids: Any, argument: str, index: int) -> str:
    if callable(ids):
        return str(ids(value))
    if ids is not None:
        return str(ids[index])
    return str(value) if isinstance(value, (str, int, float, bool, type(None))) else f"{argument}{index}"


def cases(fn: Any) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    """Each set of parameters of a test: the name in brackets, the arguments, the marks that come with them."""
    axes = []
    for note in getattr(fn, "marks", []):
        kind, arguments, named = note.mark
        if kind != "parametrize":
            continue
        names = arguments[0].replace(" ", "").split(",") if isinstance(arguments[0], str) else list(arguments[0])
        axis = []
        for index, value in enumerate(arguments[1]):
            param = value if isinstance(value, Param) else Param(*(value if len(names) > 1 else (value,)))
            parts = zip(param.values, names, strict=True)
            label = param.id or "-".join(_name(v, named.get("ids"), name, index) for v, name in parts)
            axis.append((label, dict(zip(names, param.values, strict=True)), param.marks))
        axes.append(axis)
    for chosen in itertools.product(*axes):
        arguments = {name: value for _, values, _ in chosen for name, value in values.items()}
        yield "-".join(label for label, _, _ in chosen), arguments, [m for _, _, marks in chosen for m in marks]


class Session:
    """The tests of one file, with the fixtures of ``benchmarks/conftest.py``."""

    def __init__(self, conftest: Any, config: Config) -> None:
        self.conftest, self.config = conftest, config
        self.kept: dict[str, Any] = {}

    def value(self, name: str, request: Any, made: dict[str, Any], module: Any, exits: contextlib.ExitStack) -> Any:
        """Of fixture ``name`` for the test of ``request``."""
        if name in made:
            return made[name]
        if name == "tmp_path":
            made[name] = Path(tempfile.mkdtemp())
            exits.callback(shutil.rmtree, made[name], ignore_errors=True)
            return made[name]
        fn = getattr(module, name, None) or getattr(self.conftest, name, None)
        if not hasattr(fn, "fixture_of_tests"):
            raise LookupError(f"no fixture {name!r} here: this test needs pytest itself")
        if name in self.kept:
            return self.kept[name]
        result = fn(**{n: self.value(n, request, made, module, exits) for n in inspect.signature(fn).parameters})
        if inspect.isgenerator(result):
            exits.callback(next, result, None)
            result = next(result)
        (self.kept if fn.fixture_of_tests[0] == "session" else made)[name] = result
        return result

    def run(self, module: Any, fn: Any, arguments: dict[str, Any], marks: Sequence[Any]) -> dict[str, Any]:
        """One test: its outcome, message and properties."""
        node = types.SimpleNamespace(user_properties=[])
        made: dict[str, Any] = dict(arguments)
        outcome, message = "passed", ""
        try:
            for kind, conditions, named in (note.mark for note in marks):
                if kind == "skip" or (kind == "skipif" and conditions[0]):
                    raise Skipped(named.get("reason", ""))
            with contextlib.ExitStack() as exits:
                request = types.SimpleNamespace(node=node, config=self.config)
                request.getfixturevalue = lambda name: self.value(name, request, made, module, exits)
                made["request"] = request
                fixtures = {**vars(self.conftest), **vars(module)}
                always = [n for n, f in fixtures.items() if getattr(f, "fixture_of_tests", ("", False))[1]]
                for name in always:
                    self.value(name, request, made, module, exits)
                fn(**{n: self.value(n, request, made, module, exits) for n in inspect.signature(fn).parameters})
        except Skipped as why:
            outcome, message = "skipped", f"Skipped: {why}"
        except Exception as error:
            traceback.print_exc()
            outcome, message = "failed", f"{type(error).__name__}: {error}"
        return {"outcome": outcome, "message": message[:500], **dict(node.user_properties)}


def run_without_pytest(options: argparse.Namespace) -> int:
    """Runs the tests and returns 1 if one failed."""
    sys.modules["pytest"] = stand_in()
    conftest: Any = importlib.import_module("benchmarks.conftest")
    config = Config(options)
    conftest.pytest_configure(config)
    session = Session(conftest, config)
    name = ".".join(options.file.with_suffix("").parts)
    module = importlib.import_module(name)
    around = getattr(module, "pytestmark", [])
    around = around if isinstance(around, list) else [around]
    tests = [fn for key, fn in vars(module).items() if key.startswith("test_") and inspect.isfunction(fn)]
    results = config.stash[conftest.TESTS]
    for fn in tests:
        for label, arguments, marks in cases(fn):
            full = f"{fn.__name__}[{label}]" if label else fn.__name__
            if options.k.lower() not in full.lower():
                continue
            begin = time.perf_counter()
            result = session.run(module, fn, arguments, [*around, *getattr(fn, "marks", []), *marks])
            results.append({"id": f"{options.file.as_posix()}::{full}"} | result)
            print(f"{result['outcome']} {time.perf_counter() - begin:.1f} s {full} {result['message']}", flush=True)
            conftest.write_part(config, done=False)
    conftest.write_part(config, done=True)
    return int(any(test["outcome"] == "failed" for test in results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one file with whichever runner there is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_pytest")
    parser.add_argument("file", type=Path, help="relative to the repository")
    parser.add_argument("-k", default="", metavar="WORD", help="only tests with this in their names")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--without-pytest", action="store_true", help="the stand-in even where pytest is installed")
    options = parser.parse_args(arguments)
    if options.without_pytest or importlib.util.find_spec("pytest") is None:
        return run_without_pytest(options)
    import pytest

    chosen = ["-k", options.k] if options.k else []
    results = ["--results", str(options.results)] if options.results else []
    command = [str(options.file), "-p", "no:xdist", "-p", "no:cacheprovider", "--seconds", str(options.seconds)]
    return int(pytest.main([*command, *results, *chosen]))


if __name__ == "__main__":
    sys.exit(main())
