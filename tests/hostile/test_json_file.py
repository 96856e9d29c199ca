"""The one reader of JSON: what fits its type is read, everything else is one line that says where it stands."""

import json
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpdm.json_file import Range, parse_json, read_json, read_json_lines
from tests.hostile.soak import EXAMPLES


@dataclass(frozen=True)
class Inner:
    size: tuple[int, int, int]
    rate: Annotated[float, Range(0, 1)] = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner | None
    many: list[Inner] = field(default_factory=list)
    flags: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name: got 'bad', expected a good one")


class Open(TypedDict, total=False):
    step: Annotated[int, Range(0, 9)]


GOOD = {"name": "x", "kind": "a", "inner": {"size": [1, 2, 3]}, "many": [], "flags": {"on": True}}


def test_values_get_the_types_that_are_asked_for():
    assert parse_json(json.dumps(GOOD), Outer, "f") == Outer("x", "a", Inner((1, 2, 3)), [], {"on": True})
    value = parse_json('{"step": 3, "more": [1e3, "\\ud83d\\ude00"]}', Open, "f")
    assert value == {"step": 3, "more": [1000, "😀"]}
    assert parse_json("[1, null, {}]", Any, "f") == [1, None, {}]
    rate = parse_json('{"size": [1, 2, 3], "rate": 1}', Inner, "f").rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "f: name: got 3, expected a text"),
        ({"name": "a\0b"}, r"f: name: got 'a\x00b', expected text without zero bytes"),
        ({"name": "\ud800"}, r"f: name: got '\ud800', expected text (surrogates not allowed)"),
        ({"name": "é" * 40_000}, "f: name: got a text of 80000 bytes, expected 0 to 65536"),
        ({"name": "bad"}, "f: name: got 'bad', expected a good one"),
        ({"kind": "c"}, "f: kind: got 'c', expected one of 'a', 'b'"),
        ({"kind": ["a"]}, "f: kind: got ['a'], expected one of 'a', 'b'"),
        ({"inner": 3}, "f: inner: got 3, expected an object or null"),
        ({"inner": {"size": [1, 2]}}, "f: inner.size: got a list of 2, expected 3"),
        ({"inner": {"size": [1, 2, True]}}, "f: inner.size[2]: got True, expected an integer from -2147483647 to"),
        ({"inner": {"size": [1, 2, 2**31]}}, "f: inner.size[2]: got 2147483648, expected an integer from"),
        ({"inner": {"size": [1, 2, 3.0]}}, "f: inner.size[2]: got 3.0, expected an integer"),
        ({"many": [{"size": [1, 2, 3], "rate": 1.5}]}, "f: many[0].rate: got 1.5, expected a number from 0 to 1"),
        ({"many": [{"size": [1, 2, 3], "rate": "1"}]}, "f: many[0].rate: got '1', expected a number"),
        ({"many": {}}, "f: many: got an object, expected a list"),
        ({"flags": {"x": 1}}, "f: flags.x: got 1, expected true or false"),
        ({"flags": {"a\0": True}}, "f: flags: got 'a"),
        ({"other": 1}, "f: got unknown fields ['other'], expected a subset of ['flags', 'inner', 'kind'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=r"^f: ") as error:
        parse_json(json.dumps(GOOD | changes), Outer, "f")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f: not JSON ("),
        ("{", "f: not JSON ("),
        ("[]", "f: got [], expected an object"),
        ('{"name": "x"}', "f: got no 'inner', expected an object with inner, kind, name"),
        ('{"name": NaN}', "f: not JSON (NaN is no JSON"),
        ('{"name": -Infinity}', "f: not JSON (-Infinity is no JSON"),
        ('{"name": 1e999}', "f: not JSON (the number 1e999 is out of range)"),
        ('{"name": 1, "name": 2}', "f: not JSON (the name 'name' stands twice in one object)"),
        ('{"name": ' + "1" * 5000 + "}", "f: not JSON (an integer of 5000 digits"),
        ("[" * 100_000, "f: not JSON (nested too deeply)"),
        ('{"a":' * 100_000, "f: not JSON (nested too deeply)"),
        ("[" + "[]," * 1_000_000 + "[]]", "f: got more than 2000000 values, expected fewer"),
    ],
)
def test_what_is_no_json_is_named(text, message):
    with pytest.raises(ValueError, match=r"^f: ") as error:
        parse_json(text, Outer, "f")
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 300


def test_no_more_than_the_limit_is_read(tmp_path):
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(3 << 30)  # takes no room on the disk
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"big\.json: got more than 16777216 bytes, expected at most 16777216$"):
        read_json(path, Any)
    with pytest.raises(ValueError, match=r"big\.json:1: got a line of more than 1048576 bytes"):
        list(read_json_lines(path, Any))
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"step": 1}\r\n\n{"step": 2}\r{"step": 3}')
    assert [(place.rpartition(":")[2], row["step"]) for place, row in read_json_lines(path, Open)] == [
        ("1", 1), ("3", 2), ("4", 3),
    ]  # fmt: skip
    path.write_text('{"step": 1}\n{"step": 10}')
    with pytest.raises(ValueError, match=rf"^{path}:2: step: got 10, expected an integer from 0 to 9$"):
        list(read_json_lines(path, Open))


def read_or_refused(read: Callable[[], Any]) -> tuple[Any, str | None]:
    """What is read and ``None``, or ``None`` and the words of a ValueError; any other error is the test's."""
    try:
        return read(), None
    except ValueError as error:
        return None, str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=8), values, max_size=4),
    max_leaves=12,
)


@EXAMPLES
@given(st.dictionaries(st.sampled_from([*GOOD, "other"]), JSON, max_size=6), st.booleans())
def test_any_json_is_read_or_named(changes, whole):
    value, refusal = read_or_refused(lambda: parse_json(json.dumps((GOOD if whole else {}) | changes), Outer, "f"))
    if refusal is None:
        assert parse_json(json.dumps(asdict(value)), Outer, "f") == value
    else:
        assert refusal.startswith("f: ")
        assert len(refusal) < 500
        assert "\n" not in refusal


@EXAMPLES
@given(JSON)
def test_any_json_without_what_json_lacks_is_itself(value):
    read, refusal = read_or_refused(lambda: parse_json(json.dumps(value), Any, "f"))
    assert (refusal is None) == is_plain(value)
    if refusal is None:
        assert read == value


def is_plain(value: Any) -> bool:
    """By a rule of its own: whether a value has only finite numbers below 2^63 and text of characters."""
    if isinstance(value, dict):
        return all(is_plain(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(map(is_plain, value))
    if isinstance(value, str):
        return not any(c == "\0" or 0xD800 <= ord(c) < 0xE000 for c in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool) or -(2**63) <= value < 2**63


@EXAMPLES
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_named(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    _, refusal = read_or_refused(lambda: read_json(path, Any))
    assert refusal is None or refusal.startswith(f"{path}: ")
