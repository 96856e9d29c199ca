"""Hostile sets of clips: tars, labels, captions, lists of classes and of clips, embeddings, prompts."""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from hpdm.text import EmbeddingInfo, EmbeddingStore
from tests.hostile.corpus import INFINITE, NAN, NO_OBJECTS, Case, Good, edited
from tests.tar_files import Member, pack


def cases() -> list[Case]:
    """All of them."""
    return [
        *label_cases(), *tar_cases(), *index_cases(), *caption_cases(), *list_cases(), *metadata_cases(),
        *embedding_cases(), *prompt_cases(),
    ]  # fmt: skip


def inspect(path: Path) -> list[object]:
    """The command that reads a set."""
    return ["data", "inspect", path, "--captions", "--timeout", "20"]


def shard_of(folder: Path, *options: object) -> list[object]:
    """The command that packs a set with its captions."""
    return ["data", "shard", folder / "set", folder / "out" / "shards", *options]


def sized_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header whose size is any integer, in base 256."""
    member = tarfile.TarInfo(name)
    member.type = kind
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % (1 << 88)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    return bytes(header)


def label_cases() -> list[Case]:
    """What stands beside a video in a shard, and beside the shards."""
    found = [
        Case(f"label: {name}", lambda folder, good, members=members: inspect(pack(
            folder / "s.tar", ("a.mp4", good.video), *members
        )))
        for name, members in {
            "json " + name: [("a.json", text)]
            for name, text in NO_OBJECTS.items() if name not in ("no fields",)
        }.items()
    ]  # fmt: skip
    texts: dict[str, Sequence[Member]] = {
        "cls of 5000 digits": [("a.cls", "1" * 5000)],
        "cls 999999": [("a.cls", "999999")],
        "cls 10^7": [("a.cls", "10000000")],
        "cls negative": [("a.cls", "-1")],
        "cls of other digits": [("a.cls", "١")],
        "cls a float": [("a.cls", "1.0")],
        "label true": [("a.json", '{"label": true}')],
        "label 10^30": [("a.json", '{"label": 1000000000000000000000000000000}')],
        "label NaN": [("a.json", '{"label": NaN}')],
        "class a list": [("a.json", '{"class": ["x"]}')],
        "class with escapes": [("a.json", json.dumps({"class": "\x1b]0;PWNED\x07"}))],
        "class with C1": [("a.json", json.dumps({"class": "a\x9b31m"}))],
        "class with a zero byte": [("a.json", json.dumps({"class": "a\0b"}))],
        "class of a surrogate": [("a.json", '{"class": "\\ud800"}')],
        "class of 300 bytes": [("a.json", json.dumps({"class": "x" * 300}))],
        "class empty": [("a.json", '{"class": " "}')],
        "class two dots": [("a.json", '{"class": ".."}')],
        "caption a number": [("a.json", '{"caption": 3}')],
        "caption of 70 KB": [("a.json", json.dumps({"caption": "x" * 70_000}))],
        "caption of 10 MB": [("a.txt", "word " * 2_000_000)],
        "caption with a zero byte": [("a.txt", b"a\0b")],
        "caption not UTF-8": [("a.txt", b"caf\xe9")],
        "caption in UTF-16": [("a.txt", "x".encode("utf-16"))],
        "json of 20 MB": [("a.json", b'{"x": "' + b"x" * (20 << 20) + b'"}')],
        "json and cls differ": [("a.json", '{"label": 1}'), ("a.cls", "2")],
    }
    found += [
        Case(f"label: {name}", lambda folder, good, members=members: inspect(
            pack(folder / "s.tar", ("a.mp4", good.video), *members)
        ))
        for name, members in texts.items()
    ]  # fmt: skip
    lists: dict[str, bytes] = {
        **NO_OBJECTS, "a name twice": b'["a", "a"]', "numbers": b"[1, 2]",
        "a name with escapes": b'["a", "\\u001b[31m"]',
        "a name with a zero byte": b'["a", "b\\u0000"]', "a long name": json.dumps(["a", "x" * 300]).encode(),
        "too few names": b'["a"]',
    }  # fmt: skip
    del lists["a list"]  # of no classes, which the label beside the video contradicts
    found += [
        Case(f"classes.json: {name}", lambda folder, good, text=text: _with_classes(folder, good, text))
        for name, text in lists.items()
    ]
    return found


def _with_classes(folder: Path, good: Good, text: bytes) -> list[object]:
    (folder / "classes.json").write_bytes(text)
    pack(folder / "s.tar", ("a.mp4", good.video), ("a.cls", "1"))
    return inspect(folder)


def tar_cases() -> list[Case]:
    """Tars that are damaged, or that lead elsewhere."""

    def raw(change: Callable[[bytes], bytes]) -> Callable[[Path, Good], Sequence[object]]:
        def make(folder: Path, good: Good) -> Sequence[object]:
            path = pack(folder / "s.tar", *((f"{n}.mp4", good.video) for n in range(3)))
            path.write_bytes(change(path.read_bytes()))
            return inspect(folder)

        return make

    def sparse(kind: bytes, name: str) -> Callable[[Path, Good], Sequence[object]]:
        """A tar with a member of 3 GB of zeros, which take no room on the disk."""

        def make(folder: Path, good: Good) -> Sequence[object]:
            with (folder / "s.tar").open("wb") as file:
                video = tarfile.TarInfo("a.mp4")
                video.size = len(good.video)
                file.write(video.tobuf() + good.video + bytes(-len(good.video) % 512))
                file.write(sized_header(name, 3 << 30, kind))
                file.seek(3 << 30, 1)
                file.write(bytes(1024))
            return inspect(folder)

        return make

    found = [
        Case(f"tar: {name}", raw(change))
        for name, change in {
            "empty": lambda b: b"",
            "zeros": lambda b: bytes(10240),
            "half": lambda b: b[: len(b) // 2],
            "cut in a header": lambda b: b[:300],
            "text": lambda b: b"this is no tar\n" * 100,
            "gzip": lambda b: b"\x1f\x8b\x08" + b[3:],
            "a flipped header": lambda b: b[:10] + bytes([b[10] ^ 1]) + b[11:],
            "a negative size": lambda b: sized_header("a.mp4", -512) + bytes(10240),
            "a size of 2^60": lambda b: sized_header("a.mp4", 2**60) + bytes(10240),
            "a size of 2^80": lambda b: sized_header("a.mp4", 2**80) + bytes(10240),
            "rubbish at its end": lambda b: b + b"x" * 512,
            "a pax header of rubbish": lambda b: sized_header("x", 512, tarfile.XHDTYPE) + b"9" * 512 + b,
            "a pax header with a huge size": lambda b: (
                sized_header("x", 25, tarfile.XHDTYPE) + b"25 size=9999999999999999\n".ljust(512, b"\0") + b
            ),
        }.items()
    ]
    found += [
        Case("tar: a pax header of 3 GB", sparse(tarfile.XHDTYPE, "x")),
        Case("tar: a global pax header of 3 GB", sparse(tarfile.XGLTYPE, "x")),
        Case("tar: a long name of 3 GB", sparse(tarfile.GNUTYPE_LONGNAME, "x")),
        Case("tar: a caption of 3 GB", sparse(tarfile.REGTYPE, "a.txt")),
        Case("tar: a label of 3 GB", sparse(tarfile.REGTYPE, "a.cls")),
        Case("tar: a json of 3 GB", sparse(tarfile.REGTYPE, "a.json")),
    ]
    links: dict[str, tuple[Sequence[Member], int]] = {
        "a link to /etc/passwd": ([("l.mp4", tarfile.SYMTYPE, "/etc/passwd")], 1),
        "a hard link to /etc/passwd": ([("h.mp4", tarfile.LNKTYPE, "/etc/passwd")], 1),
        "links in a circle": ([("x.mp4", tarfile.SYMTYPE, "y.mp4"), ("y.mp4", tarfile.SYMTYPE, "x.mp4")], 1),
        "a link to itself": ([("x.mp4", tarfile.SYMTYPE, "x.mp4")], 1),
    }
    found += [
        Case(
            f"tar: {name}",
            lambda folder, good, members=members: inspect(pack(folder / "s.tar", ("a.mp4", good.video), *members)),
            status,
        )
        for name, (members, status) in links.items()
    ]
    passed: dict[str, Sequence[Member]] = {
        "a device": [("d.mp4", tarfile.CHRTYPE, "")],
        "a named pipe": [("f.mp4", tarfile.FIFOTYPE, "")],
    }
    found += [
        Case(
            f"tar: {name}",
            lambda folder, good, members=members: [
                "data", "inspect", pack(folder / "s.tar", ("a.mp4", good.video), *members),
            ],
            0, line=False,
        )
        for name, members in passed.items()
    ]  # fmt: skip
    names = {
        "out of its folder": "../../../../PWNED.mp4", "absolute": "/PWNED.mp4", "escapes": "\x1b]0;PWNED\x07.mp4",
        "not UTF-8": "a\udcff.mp4", "a line break": "a\nb.mp4", "writing direction": "a\u202e.mp4",
    }  # fmt: skip
    found += [
        Case(
            f"tar: a name {kind}",
            lambda folder, good, name=name: ["data", "inspect", pack(folder / "s.tar", (name, good.video))],
            0, line=False,
        )
        for kind, name in names.items()
    ]  # fmt: skip
    found.append(Case("tar: a pattern of 10^11 names", lambda folder, _: inspect(folder / "s-{0..99999999999}.tar")))
    return found


def index_cases() -> list[Case]:
    """Forged indices beside a good shard: the shard is read anew."""
    edits: dict[str, Any] = {
        "offset a text": ("clips", 0, "offset"), "offset": -1, "size": 10**12, "label": "x", "class": ["x"],
    }  # fmt: skip
    edits = {
        "an offset of text": (("clips", 0, "offset"), "0,,:/etc/passwd,x"),
        "a negative offset": (("clips", 0, "offset"), -1),
        "a huge size": (("clips", 0, "size"), 10**12),
        "a size of NaN": (("clips", 0, "size"), NAN),
        "a label of text": (("clips", 0, "label"), "zzz"),
        "a class of a list": (("clips", 0, "class_name"), ["x"]),
        "a class with escapes": (("clips", 0, "class_name"), "\x1b[31m"),
        "a name of a number": (("clips", 0, "name"), 3),
        "no caption": (("clips", 0, "caption"), ...),
        "no clips": (("clips",), []),
        "clips of text": (("clips",), "x"),
        "an infinite count": (("left_out",), [{"reason": "x", "count": INFINITE, "places": []}]),
        "places of numbers": (("left_out",), [{"reason": "x", "count": 1, "places": [1]}]),
        "another version": (("version",), 99),
        "a version of text": (("version",), "2"),
    }

    def make(folder: Path, good: Good, path: Sequence[str | int], value: Any) -> Sequence[object]:
        shard = pack(folder / "s.tar", ("a.mp4", good.video))
        about = shard.stat()
        clip = {
            "name": "a.mp4",
            "offset": 512,
            "size": len(good.video),
            "label": None,
            "class_name": None,
            "caption": "",
        }
        saved = {"version": 2, "bytes": about.st_size, "mtime_ns": about.st_mtime_ns, "clips": [clip], "left_out": []}
        (folder / "s.tar.index.json").write_text(json.dumps(edited(saved, path, value)))
        return ["data", "inspect", shard]

    found = [
        Case(f"index: {name}", lambda folder, good, edit=edit: make(folder, good, *edit), 0, line=False)
        for name, edit in edits.items()
    ]
    for name, text in NO_OBJECTS.items():

        def forged(folder: Path, good: Good, text: bytes = text) -> Sequence[object]:
            (folder / "s.tar.index.json").write_bytes(text)
            return ["data", "inspect", pack(folder / "s.tar", ("a.mp4", good.video))]

        found.append(Case(f"index: {name}", forged, 0, line=False))
    return found


def _set(folder: Path, good: Good) -> Path:
    """A set of one class with one clip."""
    (folder / "set" / "A").mkdir(parents=True)
    (folder / "set" / "A" / "a.mp4").write_bytes(good.video)
    return folder / "set"


def caption_cases() -> list[Case]:
    """``captions.jsonl``, and texts beside the clips."""
    lines: dict[str, bytes] = {
        **{name: text for name, text in NO_OBJECTS.items() if name != "empty"},
        "a caption of a number": b'{"file": "A/a.mp4", "caption": 3}',
        "no caption": b'{"file": "A/a.mp4"}',
        "a file of a list": b'{"file": ["A/a.mp4"], "caption": "x"}',
        "a surrogate": b'{"file": "A/a.mp4", "caption": "\\ud800"}',
        "a zero byte": b'{"file": "A/a.mp4", "caption": "a\\u0000"}',
        "bytes that are no text": b'{"file": "A/a.mp4", "caption": "\xff"}',
        "a caption of 70 KB": json.dumps({"file": "A/a.mp4", "caption": "x" * 70_000}).encode(),
        "a line of 2 MB": json.dumps({"file": "A/a.mp4", "caption": "x" * (2 << 20)}).encode(),
        "a clip twice": b'{"file": "A/a.mp4", "caption": "x"}\n' * 2,
        "no clip of the set": b'{"file": "../../../etc/passwd", "caption": "x"}',
        "NaN": b'{"file": "A/a.mp4", "caption": NaN}',
    }

    def listed(folder: Path, good: Good, text: bytes) -> Sequence[object]:
        (_set(folder, good) / "captions.jsonl").write_bytes(text)
        return shard_of(folder)

    def huge(folder: Path, good: Good, name: str) -> Sequence[object]:
        with (_set(folder, good) / name).open("wb") as file:
            file.truncate(3 << 30)
        return shard_of(folder)

    found = [
        Case(f"captions.jsonl: {name}", lambda folder, good, text=text: listed(folder, good, text))
        for name, text in lines.items()
    ]
    found += [
        Case("captions.jsonl: 3 GB of zeros", lambda folder, good: huge(folder, good, "captions.jsonl")),
        Case("caption: 3 GB of zeros", lambda folder, good: huge(folder, good, "A/a.txt")),
    ]
    return found


def list_cases() -> list[Case]:
    """Lists of classes and of the clips of a split."""
    texts: dict[str, tuple[str, bytes]] = {
        "classInd.txt not UTF-8": ("classInd.txt", b"1 \xff\n"),
        "classInd.txt with escapes": ("classInd.txt", b"1 \x1b[31m\n"),
        "classInd.txt without numbers": ("classInd.txt", b"A\n"),
        "classInd.txt with a class twice": ("classInd.txt", b"1 A\n2 A\n"),
        "classInd.txt with a long line": ("classInd.txt", b"1 " + b"A" * (2 << 20)),
        "a split that leads out": ("trainlist01.txt", b"A/../../../etc/passwd 1\n"),
        "an absolute split": ("trainlist01.txt", b"/etc/passwd 1\n"),
        "a split of another class": ("trainlist01.txt", b"B/a.mp4 1\n"),
        "a split with a huge label": ("trainlist01.txt", b"A/a.mp4 999999999\n"),
        "a split of rubbish": ("trainlist01.txt", bytes(range(256))),
        "a split of nothing": ("trainlist01.txt", b"\n"),
    }

    def make(folder: Path, good: Good, file: str, text: bytes) -> Sequence[object]:
        root = _set(folder, good)
        (root / "classInd.txt").write_text("1 A\n")
        (root / "trainlist01.txt").write_text("A/a.mp4 1\n")
        (root / file).write_bytes(text)
        return shard_of(folder, "--split", "train")

    return [Case(f"list: {name}", lambda f, good, t=text: make(f, good, *t)) for name, text in texts.items()]


def metadata_cases() -> list[Case]:
    """``metadata.jsonl`` of the synthetic set."""
    line = {"file": "RedDisc/v_RedDisc_g01_c01.mp4", "radius": 3.0, "position": [[1, 2]], "velocity": [[1, 2]]}
    texts: dict[str, bytes] = {
        **NO_OBJECTS,
        **{
            f"{'.'.join(map(str, path))} = {value}": json.dumps(edited(line, path, value)).encode()
            for path, value in [
                (("radius",), "x"), (("radius",), NAN), (("radius",), 1e300), (("velocity",), []), (("velocity",), 3),
                (("velocity", 0), [1]), (("position",), [["x", 1]]), (("file",), 3),
            ]
        },
    }  # fmt: skip

    def make(folder: Path, good: Good, text: bytes) -> Sequence[object]:
        root = folder / "set"
        for file in good.clips.rglob("*.mp4"):
            (root / file.parent.name).mkdir(parents=True, exist_ok=True)
            (root / file.parent.name / file.name).write_bytes(file.read_bytes())
        (root / "classInd.txt").write_text("1 RedDisc\n2 GreenSquare\n")
        (root / "metadata.jsonl").write_bytes(text)
        options = ["--metrics", "motion", "--samples", "2", "--device", "cpu"]
        return ["evaluate", "--run", good.run, "--data", root, *options]

    return [Case(f"metadata: {name}", lambda f, good, t=text: make(f, good, t)) for name, text in texts.items()]


def embedding_cases() -> list[Case]:
    """Stores of embeddings."""

    def make(folder: Path, good: Good, change: Callable[[Path], object]) -> Sequence[object]:
        store = EmbeddingStore.create(folder / "store", EmbeddingInfo("t5", 8, 16, "fp32"))
        store.add(["a", "b"], [torch.zeros(2, 8), torch.zeros(3, 8)])
        change(folder / "store")
        options = ["--steps", "1", "--batch", "1", "--workers", "0", "--device", "cpu"]
        return [
            "train",
            "--data",
            good.clips,
            "--embeddings",
            folder / "store",
            "--out",
            folder / "out" / "r",
            *options,
        ]

    def index(**changes: Any) -> Callable[[Path], object]:
        about = {"format": 1, "encoder": "t5", "width": 8, "max_length": 16, "precision": "fp32"}
        values = {k: v for k, v in (about | changes).items() if v is not ...}
        return lambda store: (store / "index.json").write_text(json.dumps(values))

    def tensors(**changes: torch.Tensor) -> Callable[[Path], object]:
        good = {
            "keys": torch.zeros(1, 16, dtype=torch.uint8),
            "starts": torch.tensor([0, 2]),
            "rows": torch.zeros(2, 8),
        }
        return lambda store: (store / "embeddings-0.safetensors").write_bytes(save(good | changes))

    changes: dict[str, Callable[[Path], object]] = {
        **{
            f"index {name}": lambda store, text=text: (store / "index.json").write_bytes(text)
            for name, text in NO_OBJECTS.items()
        },
        "format 99": index(format=99), "format of text": index(format="1"), "no format": index(format=...),
        "width of text": index(width="8"), "width 0": index(width=0), "width 10^9": index(width=10**9),
        "precision unknown": index(precision="int4"), "a field more": index(more=1), "no encoder": index(encoder=...),
        "encoder with a zero byte": index(encoder="a\0"),
        "rows of another width": tensors(rows=torch.zeros(2, 9)),
        "rows of another type": tensors(rows=torch.zeros(2, 8, dtype=torch.int32)),
        "keys of another type": tensors(keys=torch.zeros(1, 16)),
        "keys too short": tensors(keys=torch.zeros(1, 3, dtype=torch.uint8)),
        "starts too few": tensors(starts=torch.tensor([0])),
        "starts of floats": tensors(starts=torch.tensor([0.0, 2.0])),
        "rubbish": lambda store: (store / "embeddings-0.safetensors").write_bytes(b"rubbish" * 9),
        "a huge header": lambda store: (store / "embeddings-0.safetensors").write_bytes(struct.pack("<Q", 2**62)),
    }  # fmt: skip
    return [Case(f"embeddings: {name}", lambda f, good, c=change: make(f, good, c)) for name, change in changes.items()]


def prompt_cases() -> list[Case]:
    """Files of prompts."""

    def make(folder: Path, write: Callable[[Path], object]) -> Sequence[object]:
        write(folder / "prompts.txt")
        return ["data", "embed", "--encoder", "nowhere", "--prompts", folder / "prompts.txt", "--out", folder / "out"]

    def huge(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(3 << 30)

    texts: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: path.write_bytes(b"\n\n"),
        "not UTF-8": lambda path: path.write_bytes(b"a\n\xff\n"),
        "zero bytes": lambda path: path.write_bytes(b"a\0b\n"),
        "a long line": lambda path: path.write_bytes(b"x" * 100_000),
        "3 GB of zeros": huge,
    }
    return [Case(f"prompts: {name}", lambda folder, _, w=write: make(folder, w)) for name, write in texts.items()]
