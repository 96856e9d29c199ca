"""Tars as people have them: links, joined tars, large headers and damage; nothing is lost without a word."""

import io
import json
import os
import tarfile

import pytest

from hpdm.data.finding import find_clips, survey
from hpdm.data.shard_index import index_shard
from hpdm.data.shards import find_shards, read_shards
from hpdm.data.summary import summarize
from hpdm.data.tar_members import MAX_HEADER_BYTES, TarDamageError, read_members
from tests.tar_files import pack

CLIP = b"never opened" * 100


def contents(path):
    """Name, label, caption and bytes of each clip."""
    clips = []
    for file in read_shards([path]).files:
        with open(path, "rb") as shard:
            shard.seek(file.source.offset)
            clips.append((file.source.name, file.label, file.caption, shard.read(file.source.size)))
    return clips


def left_out(path):
    return {item.reason: (item.count, list(item.places)) for item in survey(path).left_out}


LINK, SYMLINK = tarfile.LNKTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_links_are_read_as_what_they_lead_to(tmp_path, form):
    long = "x" * 150
    path = pack(
        tmp_path / "a.tar",
        ("a/one.mp4", CLIP), ("a/one.cls", "0"), ("a/one.txt", "first"),
        ("b/hard.mp4", LINK, "a/one.mp4"), ("b/hard.cls", "1"), ("b/hard.txt", LINK, "./a/one.txt"),
        ("b/soft.mp4", SYMLINK, "../a/one.mp4"), ("b/soft.cls", SYMLINK, "hard.cls"),
        ("b/chain.mp4", SYMLINK, "soft.mp4"), ("b/chain.cls", "2"),
        (f"b/{long}.mp4", SYMLINK, f"../c/{long}.mkv"), (f"b/{long}.cls", "2"),
        (f"c/{long}.mkv", CLIP[:70]), (f"c/{long}.cls", "1"),
        format=form,
    )  # fmt: skip
    assert contents(path) == [
        ("a/one.mp4", 0, "first", CLIP),
        ("b/hard.mp4", 1, "first", CLIP),
        ("b/soft.mp4", 1, "", CLIP),
        ("b/chain.mp4", 2, "", CLIP),
        (f"b/{long}.mp4", 2, "", CLIP[:70]),
        (f"c/{long}.mkv", 1, "", CLIP[:70]),
    ]
    assert survey(path).left_out == ()


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("b.mp4", LINK, "gone.mp4")], r"member 'b\.mp4': a hard link to 'gone\.mp4', which is not a member"),
        ([("d/b.mp4", SYMLINK, "a.mp4")], r"member 'd/b\.mp4': a symbolic link to 'a\.mp4', which is not a member"),
        ([("b.mp4", SYMLINK, "/etc/passwd")], r"a symbolic link to '/etc/passwd', which is not a member"),
        ([("b.mp4", SYMLINK, "../a.mp4")], r"a symbolic link to '\.\./a\.mp4', which is not a member"),
        ([("b.mp4", SYMLINK, "b.mp4")], r"member 'b\.mp4': a symbolic link that leads in a circle"),
        (
            [("b.mp4", SYMLINK, "c.mp4"), ("c.mp4", SYMLINK, "b.mp4")],
            r"'b\.mp4': a symbolic link that leads in a circle",
        ),
        ([("d", tarfile.DIRTYPE, ""), ("b.mp4", SYMLINK, "d")], r"member 'b\.mp4': leads to 'd', which is no file"),
        ([("a.cls", SYMLINK, "gone.cls")], r"member 'a\.cls': a symbolic link to 'gone\.cls', which is not a member"),
    ],
)
def test_links_that_lead_nowhere_are_named(tmp_path, members, match):
    path = pack(tmp_path / "s.tar", ("a.mp4", CLIP), *members)
    with pytest.raises(ValueError, match=rf"^{path}: .*{match}"):
        read_shards([path])
    assert list(tmp_path.iterdir()) == [path], "no index of a bad shard"


def test_links_that_are_no_part_of_a_clip_do_not_matter(tmp_path):
    path = pack(tmp_path / "s.tar", ("a.mp4", CLIP), ("latest", SYMLINK, "/somewhere"), ("k.jpg", SYMLINK, "gone.jpg"))
    assert [clip[0] for clip in contents(path)] == ["a.mp4"]
    assert left_out(path) == {
        "members without a suffix": (1, ["s.tar/latest"]), "members that belong to no video": (1, ["s.tar/k.jpg"]),
    }  # fmt: skip


def test_joined_tars_are_read_to_the_end(tmp_path):
    parts = [
        pack(tmp_path / f"{i}.part", (f"{i}.mp4", CLIP[i:]), (f"{i}.cls", str(i)), format=form)
        for i, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    ]
    joined = tmp_path / "joined.tar"
    empty = pack(tmp_path / "empty.part")
    joined.write_bytes(b"".join(part.read_bytes() for part in (empty, parts[0], parts[1], empty, parts[2])))
    assert contents(joined) == [(f"{i}.mp4", i, "", CLIP[i:]) for i in range(3)]
    # One block of zeros is an end mark as well, and the padding may be cut off or longer than usual.
    tails = [part.read_bytes().rstrip(b"\0") for part in parts]
    blocks = [tail + bytes(-len(tail) % 512) for tail in tails]
    for end in (bytes(512), bytes(700), bytes(3 * 2**20 + 17)):
        joined.write_bytes(blocks[0] + bytes(512) + blocks[1] + bytes(2**20 + 512) + blocks[2] + end)
        assert [clip[:2] for clip in contents(joined)] == [("0.mp4", 0), ("1.mp4", 1), ("2.mp4", 2)]


def test_damage_behind_an_end_mark_is_found(tmp_path):
    good = pack(tmp_path / "good.part", ("a.mp4", CLIP), ("a.cls", "0")).read_bytes()
    other = pack(tmp_path / "other.part", ("b.mp4", CLIP), ("b.cls", "1")).read_bytes()
    path = tmp_path / "s.tar"
    for tail, match in [
        (b"garbage", r"no member and no zeros behind the end mark at byte 10240"),
        (bytes(5000) + b"g", r"no member and no zeros behind the end mark at byte 14848"),
        (other[:100], r"no member and no zeros behind the end mark at byte 10240"),
        (
            other[:600],
            r"cut off or damaged, in or after member 'b\.mp4': 1200 bytes from byte 10752 on, of a file of 10840",
        ),
        (other[:2048], r"in or after member 'b\.mp4': no header and no end mark at byte 12288"),
        (
            other[:2048] + b"\xff" * 512 + other[2560:],
            r"in or after member 'b\.mp4': no header and no end mark at byte",
        ),
    ]:
        path.write_bytes(good + tail)
        with pytest.raises(ValueError, match=rf"^{path}: .*{match}"):
            read_shards([path])


def test_every_cut_through_a_tar_is_noticed(tmp_path):
    path = pack(tmp_path / "s.tar", ("a" * 120 + ".mp4", CLIP), ("é.txt", "x"), ("link.mp4", SYMLINK, "b" * 120))
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for cut in range(1, end + 1, 37):
        path.write_bytes(data[:cut])
        with path.open("rb") as file, pytest.raises(TarDamageError):
            list(read_members(file))
    path.write_bytes(data[: end + 512])
    with path.open("rb") as file:
        assert [member.size for member in read_members(file)] == [1200, 1, 0]


def header(name, size, kind=tarfile.REGTYPE, form=tarfile.GNU_FORMAT):
    """A header whose size may be any number."""
    block = bytearray(tarfile.TarInfo(name).tobuf(form))
    block[156:157] = kind
    block[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % (1 << 88)).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (header("a.mp4", -512) + bytes(10240), r"in or after member 'a\.mp4': -512 bytes"),
        (header("a.mp4", 2**60) + bytes(10240), r"in or after member 'a\.mp4': 1152921504606846976 bytes"),
        (
            header("x", 3 << 30, tarfile.XHDTYPE) + bytes(1024),
            r"got a header of 3221225472 bytes at byte 512, expected at",
        ),
        (header("x", 3 << 30, tarfile.GNUTYPE_LONGNAME) + bytes(1024), r"got a header of 3221225472 bytes"),
        (header("x", -1, tarfile.XGLTYPE) + bytes(1024), r"got a header of -1 bytes"),
        (header("x", 5000, tarfile.XHDTYPE) + bytes(1024), r"cut off, at its start: inside of the header at byte 512"),
        (header("x", 9, tarfile.XHDTYPE) + b"9 path=ab" + bytes(503), r"byte 512 is damaged: got b'9 path=ab'"),
        (header("x", 9, tarfile.XHDTYPE) + b"99 size=1" + bytes(503), r"byte 512 is damaged"),
        (
            header("x", 9, tarfile.XHDTYPE) + b"9 size=x\n" + bytes(503) + header("a.mp4", 0),
            "got size 'x', expected a num",
        ),
        (
            header("x", 9, tarfile.XHDTYPE) + b"9 path=x\n" + bytes(503) + bytes(1024),
            r"no header and no end mark at byte",
        ),
        (header("a.mp4", 0, tarfile.GNUTYPE_SPARSE) + bytes(1024), r"member 'a\.mp4': stored sparse"),
    ],
)
def test_headers_that_ask_for_too_much_or_say_nonsense(tmp_path, data, match):
    path = tmp_path / "s.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{path}: .*{match}"):
        read_shards([path])


def test_a_large_extended_header_is_read_up_to_a_megabyte(tmp_path):
    path = tmp_path / "s.tar"
    for length, fits in ((MAX_HEADER_BYTES - 100, True), (MAX_HEADER_BYTES + 1, False)):
        member = tarfile.TarInfo("a.mp4")
        member.pax_headers = {"comment": "x" * length}
        member.size = len(CLIP)
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
            out.addfile(member, io.BytesIO(CLIP))
        if fits:
            assert contents(path) == [("a.mp4", 0, "", CLIP)]
        else:
            with pytest.raises(ValueError, match="expected at most 1048576"):
                read_shards([path])


def test_global_headers_count_for_all_members(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "0123"}) as out:
        out.addfile(tarfile.TarInfo("folder.mp4/"))
        member = tarfile.TarInfo("a.mp4")
        member.size = len(CLIP)
        out.addfile(member, io.BytesIO(CLIP))
    assert contents(path) == [("a.mp4", 0, "", CLIP)]


def test_what_is_left_out_of_a_shard_is_told_and_kept_in_its_index(tmp_path):
    path = pack(
        tmp_path / "s.tar",
        ("a.mp4", CLIP), ("a.jpg", "x"), ("._a.mp4", "x"), ("README", "x"), ("b.cls", "1"), ("b.txt", "x"),
        ("c.mp4", ""), ("dev", tarfile.CHRTYPE, ""), ("folder", tarfile.DIRTYPE, ""),
    )  # fmt: skip
    expected = {
        "hidden members": (1, ["s.tar/._a.mp4"]),
        "members without a suffix": (1, ["s.tar/README"]),
        "members that are no files": (1, ["s.tar/dev"]),
        "members that belong to no video": (2, ["s.tar/b.cls", "s.tar/b.txt"]),
        "empty files": (1, ["s.tar/c.mp4"]),
    }
    assert left_out(path) == expected
    assert json.loads((tmp_path / "s.tar.index.json").read_text())["version"] == 2
    assert left_out(path) == expected, "from the index"
    pack(tmp_path / "t.tar", ("x.mp4", CLIP), ("y.txt", "x"))
    assert left_out(tmp_path)["members that belong to no video"] == (3, ["s.tar/b.cls", "s.tar/b.txt", "t.tar/y.txt"])
    assert summarize(tmp_path, survey(tmp_path))[0] == f"{tmp_path}: 2 clips without classes, in 2 shards"


def test_what_lies_beside_shards_is_told(tmp_path):
    pack(tmp_path / "a.tar", ("a.mp4", CLIP))
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    (tmp_path / "part").mkdir()
    pack(tmp_path / "part/c.tar", ("c.mp4", CLIP))
    assert [os.path.basename(file.path) for file in find_clips(tmp_path)[1]] == ["a.mp4"]
    assert {item.reason: item.count for item in survey(tmp_path).left_out} == {
        "files ending in .gz": 1, "files ending in .tar": 1, "folders without videos": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "clip",
    [
        {"offset": -1e300, "size": "y"}, {"offset": "0,,:/etc/passwd,x"}, {"size": 10**9}, {"size": 0}, {"offset": 0.5},
        {"label": "zzz"}, {"label": 10**9}, {"label": True}, {"class_name": ["l"]}, {"class_name": "\u009b"},
        {"caption": None}, {"name": 3}, {"extra": 1},
    ],
)  # fmt: skip
def test_a_forged_index_is_written_anew(tmp_path, clip):
    path = pack(tmp_path / "s.tar", ("a.mp4", CLIP))
    true = index_shard(path)
    kept = tmp_path / "s.tar.index.json"
    saved = json.loads(kept.read_text())
    saved["clips"][0] |= clip
    kept.write_text(json.dumps(saved))
    assert index_shard(path) == true
    assert json.loads(kept.read_text())["clips"][0]["name"] == "a.mp4"


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a.txt", "x" * 65_537)], r"member 'a\.txt': got 65537 bytes, expected at most 65536"),
        ([("a.json", json.dumps({"caption": "x" * 65_537}))], r"'a\.json': got a caption of 65537 bytes, expected at"),
        ([("a.txt", b"a\0b")], r"member 'a\.txt': holds zero bytes"),
        ([("a.txt", "x".encode("utf-16"))], r"member 'a\.txt': UTF-16 text, expected UTF-8"),
        ([("a.json", "[" * 100_000)], r"member 'a\.json': not JSON"),
        ([("a.json", '{"label": ' + "1" * 5000 + "}")], r"member 'a\.json': not JSON"),
        ([("a.cls", "1" * 5000)], r"member 'a\.cls': got 5000 bytes, expected at most 1024"),
        (
            [("a.cls", "999999")],
            r"s\.tar/a\.mp4: got label 999999, expected less than 10000, the most for 1 clips with",
        ),
        ([("a.json", '{"class": "a\\u001b[31m"}')], r"member 'a\.json': got class name 'a\\x1b\[31m', expected UTF-8"),
        ([("a.json", '{"class": ""}')], r"member 'a\.json': got class name ''"),
    ],
)
def test_texts_that_are_refused(tmp_path, members, match):
    path = pack(tmp_path / "s.tar", ("a.mp4", CLIP), *members)
    with pytest.raises(ValueError, match=match):
        read_shards([path])


def test_large_records_and_byte_order_marks_are_read(tmp_path):
    record = json.dumps({"class": "A", "caption": "a disc", "subtitles": "x" * 200_000})
    path = pack(
        tmp_path / "s.tar", ("a.mp4", CLIP), ("a.json", record.encode("utf-8-sig")), ("a.cls", "0".encode("utf-8-sig")),
        ("b.mp4", CLIP), ("b.json", '{"class": "A"}'), ("b.cls", "0"), ("b.txt", " a ring\r\n".encode("utf-8-sig")),
    )  # fmt: skip
    (tmp_path / "classes.json").write_text('["A", "B"]', encoding="utf-8-sig")
    found = survey(path, captions=True)
    assert (found.class_names, [file.caption for file in found.files]) == (["A", "B"], ["a disc", "a ring"])
    assert [(item.reason, item.places) for item in found.left_out] == [("classes without clips", ("'B'",))]


@pytest.mark.parametrize("name", ["a\u0007", "x" * 201, "..", ""])
def test_unsafe_classes_in_a_list_are_named(tmp_path, name):
    path = pack(tmp_path / "s.tar", ("a.mp4", CLIP), ("a.cls", "1"))
    (tmp_path / "classes.json").write_text(json.dumps(["A", name]))
    with pytest.raises(ValueError, match=r"classes\.json: class 1: got class name '"):
        read_shards([path])


def test_a_pattern_of_too_many_names():
    for pattern in ("s-{0..99999999999}.tar", "s-{0..9999}{0..9999}{0..9999}.tar"):
        with pytest.raises(ValueError, match=r"^root: .* stands for more than 1000000 names$"):
            find_shards(pattern)
