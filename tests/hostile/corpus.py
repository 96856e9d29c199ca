"""Files that are damaged or made to do harm, by what they pretend to be: each case writes some and names the command.

A case is a function of an empty folder and of :class:`Good` files to start from; it returns the command's arguments.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Good:
    """Files that are as they should be."""

    clips: Path
    """Folder of two classes, with captions and metadata."""
    run: Path
    """Run of a small model of these classes, with one checkpoint."""
    exported: Path
    """The same as a file."""

    @property
    def video(self) -> bytes:
        """A clip."""
        return sorted(self.clips.rglob("*.mp4"))[0].read_bytes()


@dataclass(frozen=True)
class Case:
    """A hostile input."""

    name: str
    make: Callable[[Path, Good], Sequence[object]]
    """Writes it into a folder; returns the arguments of the command that reads it."""
    status: int = 1
    """The exit status: 0 where the file is read past the harm, 1 where it is refused or a clip is reported."""
    line: bool = True
    """Whether the end is one line of error, which names the file. ``data inspect`` reports clips on standard output."""


def edited(values: Any, path: Sequence[str | int], value: Any) -> Any:
    """A copy of JSON values with one of them replaced, or removed for ``...``."""
    values = json.loads(json.dumps(values))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return values


NAN, INFINITE = float("nan"), float("inf")
HUGE_NUMBERS = (10**9, 2**31, 10**30)

CONFIG_EDITS: list[tuple[tuple[str | int, ...], Any]] = [
    (("format",), 9), (("format",), "2"), (("format",), None), (("format",), True), (("format",), ...),
    (("system",), "zzz"), (("system",), 3), (("system",), ["patch"]),
    (("model",), None), (("model",), []), (("model",), {}), (("model",), ...),
    (("classes",), ...), (("classes",), "AB"), (("classes",), [1, 2]), (("classes",), ["A", None]),
    (("classes",), ["a", "b\0"]), (("classes",), ["a", "\ud800"]), (("classes",), ["a", "\x1b[31m"]),
    (("classes",), ["a", "x" * 300]), (("classes",), ["a", "b", "c"]), (("classes",), ["a", ".."]),
    (("training",), None), (("training",), []), (("training",), ...), (("training", "ema"), "x"),
    (("training", "ema"), [None]), (("training", "ema"), {}), (("training", "stride"), 0),
    (("training", "stride"), "1"), (("training", "fps"), -1), (("training", "short"), "maybe"),
    (("model", "width"), "64"), (("model", "width"), True), (("model", "width"), 1.5), (("model", "width"), None),
    (("model", "width"), 0), (("model", "width"), -8), (("model", "width"), 64), (("model", "width"), 10**6),
    *((("model", name), n) for name in ("width", "latents", "classes", "latent_layers") for n in HUGE_NUMBERS),
    (("model", "levels"), 10**9), (("model", "levels"), 0), (("model", "levels_per_block"), []),
    (("model", "levels_per_block"), [3] * 10_000), (("model", "levels_per_block"), "123"),
    (("model", "patch"), [2, 8]), (("model", "patch"), [2, 8, "8"]), (("model", "patch"), [2, 8, 10**9]),
    (("model", "patch"), 3), (("model", "ratio"), [3, 3, 3]), (("model", "ratio"), [0, 0, 0]),
    (("model", "input_scale"), NAN), (("model", "input_scale"), INFINITE), (("model", "input_scale"), "1"),
    (("model", "input_scale_decay"), -1), (("model", "conditioning"), "magic"), (("model", "conditioning"), 3),
    (("model", "fusion"), None), (("model", "head_width"), 0), (("model", "head_width"), 7),
    (("model", "coordinates"), "yes"), (("model", "unknown"), 1), (("model", "conditioning_dropout"), 2),
    (("model", "token_mlp_ratio"), 0), (("model", "latent_mlp_ratio"), 10**9), (("model", "text_width"), -1),
]  # fmt: skip

STATE_EDITS: list[tuple[tuple[str | int, ...], Any]] = [
    (("format",), 4), (("format",), 1), (("format",), "2"), (("format",), None), (("format",), NAN), (("format",), ...),
    (("step",), 3), (("step",), -5), (("step",), 10**30), (("step",), "1"), (("step",), NAN), (("step",), None),
    (("step",), True), (("step",), 1.0), (("step",), ...), (("step",), [1]),
    (("files",), ...), (("files",), []), (("files",), {}), (("files",), None), (("files",), "x"),
    (("files",), {"../../../../etc/passwd": 1}), (("files",), {"/etc/passwd": 1}),
    (("files",), {"model/x": 1}), (("files",), {"model/x\0": 1}),
    (("ema_updates",), None), (("ema_updates",), "3"), (("ema_updates",), -1), (("ema_updates",), ...),
]  # fmt: skip

NO_OBJECTS: dict[str, bytes] = {
    "empty": b"", "half": b'{"format": 2, "st', "a list": b"[]", "a number": b"3", "null": b"null", "no fields": b"{}",
    "not UTF-8": b"\xff\xfe{}", "UTF-16": '{"format": 2}'.encode("utf-16"), "zero bytes": b"{}\0\0",
    "nested": b'{"a":' * 100_000, "brackets": b"[" * 1_000_000, "twice": b'{"format": 2, "format": 2}',
    "digits": b'{"format": ' + b"1" * 100_000 + b"}", "binary": bytes(range(256)) * 20,
    "many": b"[" + b"{}," * 3_000_000 + b"{}]",
}  # fmt: skip


def cases() -> list[Case]:
    """The whole corpus."""
    from tests.hostile import corpus_data, corpus_videos

    return [*run_cases(), *exported_cases(), *corpus_data.cases(), *corpus_videos.cases()]


def export_of(source: Path, folder: Path) -> list[object]:
    """A command that loads a run or a file."""
    return ["export", "--run", source, "--out", folder / "out" / "exported.safetensors"]


def run_cases() -> list[Case]:
    """``config.json`` and ``state.json`` of a run, and the weights beside them."""

    def config(change: Callable[[Any], bytes]) -> Callable[[Path, Good], Sequence[object]]:
        return lambda folder, good: _run_with(folder, good, "config.json", change)

    def state(change: Callable[[Any], bytes]) -> Callable[[Path, Good], Sequence[object]]:
        return lambda folder, good: _run_with(folder, good, "checkpoints/step-00000001/state.json", change)

    found = []
    for kind, make, edits in (("config", config, CONFIG_EDITS), ("state", state, STATE_EDITS)):
        for path, value in edits:
            change = lambda values, path=path, value=value: json.dumps(edited(values, path, value)).encode()
            found.append(Case(f"{kind}: {'.'.join(map(str, path))} = {_short(value)}", make(change)))
        found += [Case(f"{kind}: {name}", make(lambda _, text=text: text)) for name, text in NO_OBJECTS.items()]
    found += [
        Case(f"weights: {name}", lambda folder, good, change=change: _run_with_weights(folder, good, change))
        for name, change in {
            "integers for floats": lambda b: b.replace(b'"F32"', b'"I32"'),
            "another shape": lambda b: b.replace(b'"shape":[4,16]', b'"shape":[16,4]'),
            "NaN": lambda b: b[:-4] + struct.pack("<f", NAN),
            "a huge header": lambda b: struct.pack("<Q", 2**62) + b[8:],
            "a header of rubbish": lambda b: b[:9] + b"\xff" * 9 + b[18:],
            "half": lambda b: b[: len(b) // 2],
            "a header that is a list": lambda b: (
                b[:8] + b"[".ljust(struct.unpack("<Q", b[:8])[0] - 1) + b"]" + _rest(b)
            ),
        }.items()
    ]
    return found


def exported_cases() -> list[Case]:
    """Exported files: their headers, and the configs in these."""

    def header(change: Callable[[Any], Any]) -> Callable[[Path, Good], Sequence[object]]:
        def make(folder: Path, good: Good) -> Sequence[object]:
            values, data = read_safetensors(good.exported)
            return _exported(folder, write_safetensors(change(values), data))

        return make

    def about(change: Callable[[Any], str]) -> Callable[[Path, Good], Sequence[object]]:
        def with_text(values: Any) -> Any:
            return edited(values, ("__metadata__", "hpdm"), change(json.loads(values["__metadata__"]["hpdm"])))

        return header(with_text)

    def raw(change: Callable[[bytes], bytes]) -> Callable[[Path, Good], Sequence[object]]:
        return lambda folder, good: _exported(folder, change(good.exported.read_bytes()))

    edits = [*CONFIG_EDITS, (("step",), -1), (("step",), "x"), (("weights",), 3), (("weights",), "../x")]
    found = [
        Case(
            f"exported: {'.'.join(map(str, path))} = {_short(value)}",
            about(lambda values, path=path, value=value: json.dumps(edited(values, path, value))),
        )
        for path, value in edits
    ]
    tensor = "latents"
    found += [
        Case(f"exported header: {name}", header(change))
        for name, change in {
            "no metadata": lambda h: edited(h, ("__metadata__",), ...),
            "metadata of numbers": lambda h: edited(h, ("__metadata__", "hpdm"), 3),
            "other metadata": lambda h: edited(h, ("__metadata__",), {"x": "y"}),
            "integers for floats": lambda h: edited(h, (tensor, "dtype"), "I32"),
            "an unknown type": lambda h: edited(h, (tensor, "dtype"), "X7"),
            "complex numbers": lambda h: edited(h, (tensor, "dtype"), "C64"),
            "another shape": lambda h: edited(h, (tensor, "shape"), h[tensor]["shape"][::-1]),
            "a negative shape": lambda h: edited(h, (tensor, "shape"), [-1, 2]),
            "a huge shape": lambda h: edited(h, (tensor, "shape"), [2**62, 2**62]),
            "offsets outside": lambda h: edited(h, (tensor, "data_offsets"), [0, 2**40]),
            "offsets that overlap": lambda h: edited(h, (tensor, "data_offsets"), [0, 16]),
            "no offsets": lambda h: edited(h, (tensor, "data_offsets"), ...),
            "a tensor less": lambda h: edited(h, (tensor,), ...),
            "a name more": lambda h: {**h, "more": h[tensor]},
        }.items()
    ]
    found += [
        Case(f"exported file: {name}", raw(change))
        for name, change in {
            "empty": lambda b: b"",
            "seven bytes": lambda b: b[:7],
            "only a length": lambda b: b[:8],
            "half": lambda b: b[: len(b) // 2],
            "without its last byte": lambda b: b[:-1],
            "a byte more": lambda b: b + b"\0",
            "a header of 2^63 bytes": lambda b: struct.pack("<Q", 2**63) + b[8:],
            "a header of 99 MB": lambda b: struct.pack("<Q", 99 << 20) + b[8:],
            "a header of no bytes": lambda b: struct.pack("<Q", 0) + b[8:],
            "a pickle": lambda b: b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n(S'touch PWNED'\ntR.",
            "a zip": lambda b: b"PK\3\4" + bytes(200),
            "not UTF-8": lambda b: b[:8] + b"{\xff" + b[10:],
            "NaN weights": lambda b: b[:-4] + struct.pack("<f", NAN),
            "infinite weights": lambda b: b[:-4] + struct.pack("<f", INFINITE),
            "a name twice": _name_twice,
            "a text of 20 MB": lambda b: (
                struct.pack("<Q", 20 << 20) + b'{"__metadata__": {"hpdm": "' + b"x" * (20 << 20)
            ),
        }.items()
    ]
    return found


def read_safetensors(path: Path) -> tuple[Any, bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(header: Any, data: bytes) -> bytes:
    """A safetensors file."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _name_twice(file: bytes) -> bytes:
    length = struct.unpack("<Q", file[:8])[0]
    header = (
        file[8 : 8 + length].rstrip()[:-1] + b', "latents": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    )
    return struct.pack("<Q", len(header)) + header + file[8 + length :]


def _run_with(folder: Path, good: Good, file: str, change: Callable[[Any], bytes]) -> Sequence[object]:
    run = shutil.copytree(good.run, folder / "run")
    (run / file).write_bytes(change(json.loads((run / file).read_text())))
    return export_of(run, folder)


def _rest(file: bytes) -> bytes:
    """A safetensors file without its header."""
    return file[8 + struct.unpack("<Q", file[:8])[0] :]


def _run_with_weights(folder: Path, good: Good, change: Callable[[bytes], bytes]) -> Sequence[object]:
    """A run whose averaged weights are changed, and whose list of files says so."""
    run = shutil.copytree(good.run, folder / "run")
    checkpoint = run / "checkpoints" / "step-00000001"
    (weights,) = (checkpoint / "ema").iterdir()
    before = weights.read_bytes()
    weights.write_bytes(change(before))
    assert weights.read_bytes() != before
    state = json.loads((checkpoint / "state.json").read_text())
    state["files"][weights.relative_to(checkpoint).as_posix()] = weights.stat().st_size
    (checkpoint / "state.json").write_text(json.dumps(state))
    return export_of(run, folder)


def _exported(folder: Path, content: bytes) -> Sequence[object]:
    path = folder / "stranger.safetensors"
    path.write_bytes(content)
    return export_of(path, folder)


def _short(value: Any) -> str:
    if value is ...:
        return "missing"
    text = ascii(value)
    return text if len(text) <= 30 else f"{text[:30]}..."
