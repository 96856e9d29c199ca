"""The one reader of JSON: every JSON that comes from a file is checked here, against the type of what it should hold.

A file may be damaged, of another version, or made to do harm. So a file is read up to a limit, and memory is bounded
before it is parsed; NaN, infinity and repeated keys are errors; and every value is held against a Python type:

=========================  =============================================================================================
type                       what it takes
=========================  =============================================================================================
``bool``, ``None``         themselves
``int``                    an integer between -2^31 and 2^31; another range with ``Annotated[int, Range(0, 2**40)]``
``float``                  a finite number; another range as for ``int``
``str``                    text of at most 64 KB in UTF-8, without zero bytes and lone surrogates;
                           ``Annotated[str, Range(1, 200)]`` for another number of bytes
``Literal["a", "b"]``      one of these
``A | B``                  the first that fits
``list[T]``                any number of T; ``Annotated[list[T], Range(1, 9)]`` for another number
``tuple[T, ...]``          the same; ``tuple[int, int, int]`` that many
``dict[str, T]``           an object with any names; ``Annotated[dict[str, T], Range(1, 9)]`` for their number
a dataclass                an object with its fields and no others; those with a default may be missing
a ``TypedDict``            an object with its fields and any others, which are kept unchecked; those of one with
                           ``total=False`` may be missing
``Any``                    any JSON whose numbers and texts could be those of the types above, integers up to 2^63
=========================  =============================================================================================

Every error is a ValueError of one line: the file, the place in it, what was got and what was expected.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints, is_typeddict

from hpdm.files import decode_text, numbered_lines, read_bytes

MAX_BYTES = 16 * 2**20
"""Largest file that is read where nothing else is said."""
MAX_TEXT_BYTES = 64 * 1024
"""Longest text that is taken where nothing else is said."""
_MAX_VALUES = 2_000_000  # in one file: each takes up to 250 bytes of memory, however few it takes in the file
_MAX_DIGITS = 20


@dataclass(frozen=True)
class Range:
    """The allowed values of a number, bytes of a text or entries of a list, both ends included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` is allowed."""
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low}" if self.low == self.high else f"{self.low} to {self.high}"


_INTEGERS, _TEXTS = Range(1 - 2**31, 2**31 - 1), Range(0, MAX_TEXT_BYTES)
_ANY_INTEGERS = Range(-(2**63), 2**63 - 1)


def read_json(path: Path, kind: Any, limit: int = MAX_BYTES) -> Any:
    """The contents of a JSON file, of the type ``kind`` (see above).

    Args:
        path: UTF-8, with or without a byte-order mark.
        kind: the type; lists become tuples and objects dataclasses where it says so.
        limit: most bytes of the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too long, no JSON, or holds something else; the message names it and the place in it.
    """
    return parse_json(decode_text(read_bytes(path, limit), path), kind, path)


def read_json_lines(path: Path, kind: Any) -> Iterator[tuple[str, Any]]:
    """The values of a file with one JSON text a line, each with ``path:line number``; blank lines are skipped.

    Raises:
        OSError, ValueError: as :func:`read_json`; a line of more than 1 MB.
    """
    for place, line in numbered_lines(path):
        yield place, parse_json(line, kind, place)


def parse_json(text: str, kind: Any, place: object) -> Any:
    """The value of a JSON text; as :func:`read_json`, with ``place`` as the name of the text in errors."""
    if text.count(",") + text.count("[") + text.count("{") > _MAX_VALUES:
        raise ValueError(f"{place}: got more than {_MAX_VALUES} values, expected fewer")
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_number
        )
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{place}: not JSON (nested too deeply)") from None
    return checked(value, kind, place)


def checked(value: Any, kind: Any, place: object) -> Any:
    """A value that JSON can hold as the type ``kind``; errors as :func:`read_json`, with ``place`` as its name."""
    return _checked(value, kind, _Place(None, str(place)))


class _Place:
    """Where a value is: the name of the file, or a place and a step from it, put into words for an error alone."""

    __slots__ = ("step", "within")

    def __init__(self, within: _Place | None, step: str | int) -> None:
        self.within, self.step = within, step

    def __str__(self) -> str:
        if self.within is None:
            return str(self.step)
        if isinstance(self.step, int):
            return f"{self.within}[{self.step}]"
        name = self.step if len(self.step) <= 60 else f"{self.step[:60]}..."
        return f"{self.within}{': ' if self.within.within is None else '.'}{name}"


def _checked(value: Any, kind: Any, place: _Place) -> Any:
    kind, origin, arguments, limits = _parts(kind)
    if kind in _SCALARS:
        return _SCALARS[kind](value, limits, place)
    if kind is Any:
        return _any(value, place)
    if kind is None or kind is type(None):
        return value if value is None else _refuse(value, "null", place)
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, place)
    if origin is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in arguments)
        return value if fits else _refuse(value, f"one of {', '.join(map(repr, arguments))}", place)
    if origin in (list, tuple):
        return _sequence(value, origin, arguments, limits, place)
    if origin is dict:
        entries = value.items() if isinstance(value, dict) else _refuse(value, "an object", place)
        if limits is not None and not limits.holds(len(value)):
            raise ValueError(f"{place}: got {len(value)} entries, expected {limits}")
        return {
            _checked(name, arguments[0], place): _checked(v, arguments[1], _Place(place, name)) for name, v in entries
        }
    if is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return _record(value, kind, place)
    raise TypeError(f"kind: got {kind!r}, expected a type that JSON can be checked against")


@functools.cache
def _parts(kind: Any) -> tuple[Any, Any, tuple[Any, ...], Range | None]:
    """A type without its range, what it is made of, and the range."""
    limits = None
    if get_origin(kind) is Annotated:
        limits = next((a for a in get_args(kind)[1:] if isinstance(a, Range)), None)
        kind = get_args(kind)[0]
    return kind, get_origin(kind), get_args(kind), limits


def _one_of(value: Any, kinds: tuple[Any, ...], place: _Place) -> Any:
    reasons = []
    for kind in kinds:
        try:
            return _checked(value, kind, place)
        except ValueError as error:
            reasons.append(str(error))
    # The reason of the first one says most: `X | None` is an X.
    has_parts = isinstance(value, dict | list)  # then the reason may be about one of them
    raise ValueError(reasons[0] + (" or null" if type(None) in kinds and not has_parts else ""))


def _sequence(value: Any, origin: Any, kinds: tuple[Any, ...], limits: Range | None, place: _Place) -> Any:
    if not isinstance(value, list | tuple):
        _refuse(value, "a list", place)
    if origin is tuple and kinds[-1] is not Ellipsis:
        limits = Range(len(kinds), len(kinds))
    else:
        kinds = (kinds[0],) * len(value)
    if limits is not None and not limits.holds(len(value)):
        raise ValueError(f"{place}: got a list of {len(value)}, expected {limits}")
    return origin(_checked(entry, kind, _Place(place, n)) for n, (entry, kind) in enumerate(zip(value, kinds)))


def _record(value: Any, kind: Any, place: _Place) -> Any:
    """A dataclass or a ``TypedDict``."""
    if not isinstance(value, dict):
        _refuse(value, "an object", place)
    hints, required, is_open = _fields(kind)
    missing = sorted(required - set(value))
    if missing:
        raise ValueError(f"{place}: got no {missing[0]!r}, expected an object with {', '.join(sorted(required))}")
    unknown = sorted(set(value) - set(hints))
    if unknown and not is_open:
        raise ValueError(f"{place}: got unknown fields {_shown(unknown)}, expected a subset of {sorted(hints)}")
    fields = {name: _checked(value[name], hint, _Place(place, name)) for name, hint in hints.items() if name in value}
    if is_open:
        return {**value, **fields}
    try:
        return kind(**fields)
    except ValueError as error:  # what the class itself demands of its fields
        raise ValueError(f"{place}: {error}") from None


@functools.cache
def _fields(kind: Any) -> tuple[Mapping[str, Any], frozenset[str], bool]:
    """The types of a class's fields, the names of those that must be there, and whether others may be."""
    hints = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        return hints, kind.__required_keys__, True
    fields = [f for f in dataclasses.fields(kind) if f.init]
    required = (f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
    return {f.name: hints[f.name] for f in fields}, frozenset(required), False


def _flag(value: Any, _: Range | None, place: _Place) -> bool:
    return value if isinstance(value, bool) else _refuse(value, "true or false", place)


def _whole(value: Any, limits: Range | None, place: _Place) -> int:
    limits = limits or _INTEGERS
    if type(value) is not int or not limits.holds(value):
        _refuse(value, f"an integer from {limits}", place)
    return value


def _real(value: Any, limits: Range | None, place: _Place) -> float:
    if type(value) not in (int, float) or abs(value) == float("inf") or value != value:
        _refuse(value, "a number", place)
    if limits is not None and not limits.holds(value):
        _refuse(value, f"a number from {limits}", place)
    return float(value)


def _text(value: Any, limits: Range | None, place: _Place) -> str:
    limits = limits or _TEXTS
    if not isinstance(value, str):
        _refuse(value, "a text", place)
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: got {_shown(value)}, expected text ({error.reason})") from None
    if "\0" in value:
        _refuse(value, "text without zero bytes", place)
    if not limits.holds(size):
        raise ValueError(f"{place}: got a text of {size} bytes, expected {limits}")
    return value


_SCALARS = {bool: _flag, int: _whole, float: _real, str: _text}


def _any(value: Any, place: _Place) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return [_any(entry, _Place(place, n)) for n, entry in enumerate(value)]
    if isinstance(value, dict):
        return {_text(name, _TEXTS, place): _any(entry, _Place(place, name)) for name, entry in value.items()}
    if isinstance(value, int):
        return _whole(value, _ANY_INTEGERS, place)
    return _real(value, None, place) if isinstance(value, float) else _text(value, _TEXTS, place)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        name = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {_shown(name)} stands twice in one object")
    return values


def _integer(digits: str) -> int:
    # Python takes time that grows with the square of the number of digits.
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, expected at most {_MAX_DIGITS}")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {digits[:40]} is out of range")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON, expected a finite number")


def _refuse(value: Any, expected: str, place: _Place) -> NoReturn:
    raise ValueError(f"{place}: got {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    """A value on one line of bounded length."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"a list of {len(value)}"
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."
