"""Text files in any encoding, names of classes that are safe, and the summary of what was found."""

import logging
import os
from pathlib import Path

import pytest

from hpdm.data.class_names import ClassIndex, check_class_name
from hpdm.data.finding import find_clips, survey
from hpdm.data.layout import find_videos
from hpdm.data.summary import log_summary, summarize
from hpdm.files import decode_text, read_text
from hpdm.printable import PrintableFormatter, printable
from hpdm.text import read_prompts
from tests.data.trees import BOM, captions, lines, put, write

# ---- text ----


def test_byte_order_marks_are_no_part_of_the_text(tmp_path):
    root = put(tmp_path / "set", "Archery/v_Archery_g01_c01.mp4")
    write(root / "classInd.txt", "1 Archery\r\n", "utf-8-sig")
    write(root / "trainlist01.txt", "Archery/v_Archery_g01_c01.avi 1\r\n", "utf-8-sig")
    write(root / "Archery/v_Archery_g01_c01.txt", "a bow\r\n", "utf-8-sig")
    assert captions(root, split="train") == {"Archery/v_Archery_g01_c01.mp4": "a bow"}
    write(root / "captions.jsonl", lines(("Archery/v_Archery_g01_c01.mp4", "listed")), "utf-8-sig")
    assert captions(root) == {"Archery/v_Archery_g01_c01.mp4": "listed"}
    assert read_prompts(write(tmp_path / "prompts.txt", "a disc\r\na ring", "utf-8-sig")) == ["a disc", "a ring"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["classInd.txt", "captions.jsonl", "A/a.txt", "trainlist01.txt"])
def test_text_of_another_encoding_is_named(tmp_path, encoding, name):
    put(tmp_path, "A/a.mp4")
    write(tmp_path / name, "1 A\r\n", encoding)
    with pytest.raises(ValueError, match=rf"^{tmp_path / name}(:1)?: .*UTF-16.*, expected UTF-8"):
        find_clips(tmp_path, captions=True, split="train" if name.startswith("train") else None)


def test_text_is_decoded_strictly(tmp_path):
    assert decode_text(BOM + "é".encode(), "x") == "é"
    assert read_text(write(tmp_path / "a", "one\r\ntwo\rthree\n")) == "one\ntwo\nthree\n"
    with pytest.raises(ValueError, match=r"^x: not UTF-8 text: invalid continuation byte at byte 1$"):
        decode_text(b"a\xe9b", "x")


# ---- names ----


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("..", "a name that can be part"),
        ("", "a name that can be part"),
        ("  ", "a name that can be part"),
        ("a\0b", r"'a\\x00b', expected UTF-8 without control"),
        ("\x1b[31mred", r"'\\x1b\[31mred', expected UTF-8 without control"),
        ("c1\x9b", r"'c1\\x9b', expected"),
        ("evil\u202ename", r"'evil\\u202ename', expected"),
        ("a\udcff", r"'a\\udcff', expected UTF-8"),
        ("é" * 101, "of 202 bytes, expected at most 200"),
        (7, "got 7, expected the name of a class as text"),
    ],
)
def test_unsafe_class_names(name, match):
    with pytest.raises(ValueError, match=rf"^classes\.json: class 3: .*{match}"):
        check_class_name(name, "classes.json: class 3")


@pytest.mark.parametrize(
    "name",
    [
        "Archery",
        "é" * 100,
        "a" * 200,
        "Playing Guitar",
        "v1.0",
        "-rf",
        "红色 🎾",
        "playing guitar/bass",
        "..\\x",
        "../x",
    ],
)
def test_safe_class_names(name):
    assert check_class_name(name, "here") == name


@pytest.mark.parametrize("folder", [b"a\xff", b"\x1b]0;PWNED\x07", "é".encode() * 120])
def test_unsafe_class_folders_are_refused(tmp_path, folder):
    name = os.fsdecode(folder)
    put(tmp_path, f"{name}/a.mp4")
    with pytest.raises(ValueError, match=r"^root: a folder in .*: got class name '") as error:
        find_videos(tmp_path)
    assert printable(str(error.value)) == str(error.value)


def test_an_index_finds_the_exact_name_first():
    index = ClassIndex(["b", "B", "straße"], "list")
    assert [index.find(name, "x") for name in ("b", "B", "STRASSE", "c")] == ["b", "B", "straße", None]
    assert index.labels == {"b": 0, "B": 1, "straße": 2}


def test_text_for_a_terminal():
    assert printable("a\x1b[0m\n\x7f\x9b\udcffé红\u202e") == "a\\x1b[0m\\n\\x7f\\x9b\\udcffé红\\u202e"
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"
    record = logging.LogRecord("hpdm", logging.INFO, "", 0, "%s\nsecond", ("\x1b]0;x\x07",), None)
    assert PrintableFormatter("%(name)s: %(message)s").format(record) == "hpdm: \\x1b]0;x\\x07\nsecond"


# ---- summary ----


def test_the_summary(tmp_path, caplog):
    put(tmp_path, "A/a.mp4", "A/b.mp4", "B/b.mp4", "B/x.flv", "B/evil\x1b.flv", "B/y.flv", "B/z.flv")
    put(tmp_path, "B/0.mp4", content=b"")
    write(tmp_path / "captions.jsonl", lines(("A/a.mp4", "x"), ("typo.mp4", "y")))
    with caplog.at_level(logging.INFO):
        log_summary(tmp_path, survey(f"{tmp_path}/", captions=True))
    assert caplog.messages == [
        f"{tmp_path}: 3 clips of 2 classes, 1 to 2 of each, in 3 files",
        "left out: empty files: 1 (B/0.mp4)",
        "left out: files ending in .flv: 4 (B/evil\\x1b.flv, B/x.flv, B/y.flv, ...)",
        "left out: lines of captions.jsonl that match no clip: 1 (captions.jsonl:2 'typo.mp4')",
    ]


def test_the_summary_of_a_flat_folder(tmp_path):
    put(tmp_path, "a.mp4")
    assert summarize(tmp_path, survey(tmp_path)) == [f"{tmp_path}: 1 clips without classes, in 1 files"]


def test_a_folder_given_as_text_with_a_slash(tmp_path):
    put(tmp_path, "A/a.mp4", "B/b.mp4")
    (file, _) = find_clips(f"{tmp_path}/")[1]
    assert Path(file.path) == tmp_path / "A/a.mp4"
