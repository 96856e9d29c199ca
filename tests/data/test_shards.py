"""Tar shards: the same clips as from the folder they were packed from, bit for bit; damage and contradictions named."""

import io
import json
import os
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hpdm.commands.data import Inspect, Shard
from hpdm.data import shard_index
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import DecodeError, Member, probe, read_clip, verify
from hpdm.data.finding import find_clips
from hpdm.data.order import ClipKey
from hpdm.data.shard_index import index_shard
from hpdm.data.shard_writer import write_shards
from hpdm.data.shards import find_shards, read_shards
from hpdm.data.synthetic import render_synthetic
from hpdm.training.batches import MicroBatches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("folder") / "set"
    return render_synthetic(out, clips=4, frames=8, size=(16, 32), classes=["RedDisc", "CyanDiamond"])


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "shards"
    names, files = find_clips(folder, captions=True)
    paths = write_shards(out, folder, names, files, 3)
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    return out


@pytest.fixture
def copy(packed, tmp_path):
    """A copy to damage."""
    return shutil.copytree(packed, tmp_path / "copy", ignore=shutil.ignore_patterns("*.index.json"))


@pytest.fixture
def video(folder):
    return (folder / "RedDisc/v_RedDisc_g01_c01.mp4").read_bytes()


def tar(path, members, **options):
    """A tar of ``{name: bytes or str}``."""
    with tarfile.open(path, "w", **options) as out:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


def test_shards_give_what_the_folder_gives(folder, packed):
    options = {"frames": 4, "size": (8, 16), "seed": 3, "captions": True}
    plain, data = VideoDataset(folder, **options), VideoDataset(packed, **options)
    assert data.class_names == ["RedDisc", "CyanDiamond"]
    assert data.labels == plain.labels
    for key in [ClipKey(i, epoch) for epoch in range(3) for i in range(8)]:
        one, other = plain[key], data[key]
        assert torch.equal(one["video"], other["video"])
        for name in ("label", "caption", "start", "decoder"):
            assert one[name] == other[name]
        assert other["caption"]
    assert data[4]["path"] == f"{packed}/shard-000001.tar/RedDisc/v_RedDisc_g01_c01.mp4"
    assert VideoDataset(packed, frames=4, size=8)[0]["caption"] == ""


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_a_member_is_read_frame_for_frame_like_its_file(folder, packed, decoder):
    plain = [file.source for file in find_clips(folder)[1]]
    members = [file.source for file in find_clips(packed)[1]]
    for path, member in zip(plain, members):
        numbers = [5, 0, 0, 7, 2]
        assert np.array_equal(
            read_clip(path, numbers, decoder=decoder).frames, read_clip(member, numbers, decoder=decoder).frames
        )
        one, other = probe(path), probe(member)
        assert (one.frames, one.fps, one.codec, one.height) == (other.frames, other.fps, other.codec, other.height)
        assert other.path == str(member)
        verify(member)
        with pytest.raises(IndexError, match=r"shard-0.*\.mp4: frame 8 asked, the video has 8"):
            read_clip(member, [8], decoder=decoder)


def test_a_member_with_a_wrong_range_is_not_a_video(packed):
    member = find_clips(packed)[1][1].source
    for wrong in (member._replace(offset=member.offset + 100), member._replace(size=0), member._replace(offset=10**9)):
        with pytest.raises(DecodeError, match=r"shard-000000\.tar/CyanDiamond/v_.*\.mp4: not a readable") as error:
            probe(wrong)
        assert "subfile,," not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.tar is not a file"):
        read_clip(Member("gone.tar", "a.mp4", 512, 100), [0])


def test_patterns(packed, tmp_path, monkeypatch):
    names = [f"shard-00000{i}.tar" for i in range(3)]
    for pattern, expected in [
        (packed, names),
        (packed / "shard-000001.tar", names[1:2]),
        (packed / "shard-{000000..000001}.tar", names[:2]),
        (packed / "shard-00000{2,0}.tar", [names[2], names[0]]),
        (packed / "shard-*[01].tar", names[:2]),
        (packed.parent / "{shards,shards}" / "*2.tar", names[2:]),
    ]:
        assert [path.name for path in find_shards(pattern)] == expected
        data = VideoDataset(pattern, frames=4, size=8)
        assert len(data) == sum(2 if name == names[2] else 3 for name in expected)
    assert find_shards(packed / "nothing") is None
    for name in ("{a,b}[1].mp4", "{a,b}[1].tar"):
        (tmp_path / name).touch()
    assert find_shards(tmp_path / "{a,b}[1].mp4") is None, "a file that is there is no pattern"
    assert find_shards(tmp_path / "{a,b}[1].tar") == [tmp_path / "{a,b}[1].tar"]
    monkeypatch.chdir(packed)
    assert len(VideoDataset("shard-{000000..000002}.tar", frames=4, size=8)) == 8
    with pytest.raises(FileNotFoundError, match=r"root: no file matches .*none-\*\.tar"):
        VideoDataset(packed / "none-*.tar", frames=4, size=8)
    with pytest.raises(ValueError, match=r"matches .*classes\.json, expected shards with names ending in \.tar"):
        VideoDataset(packed / "*.json", frames=4, size=8)
    with pytest.raises(FileNotFoundError, match=r"shard-none00\.tar is not a file \(2 of the 4 shards of .* missing\)"):
        VideoDataset(packed / "shard-{0000,none}0{0..1}.tar", frames=4, size=8)


def test_webdatasets_layout(tmp_path, video):
    """Keys, directories in keys, any order of members, PAX and GNU headers, metadata, a json instead of cls and txt."""
    long = "a/" * 60 + "é" * 40
    members = [
        ("__meta__/x.json", "{}"),
        ("readme", "no suffix"),
        ("./dir.with.dots/k1.txt", " über \n"),
        ("./dir.with.dots/k1.mp4", video),
        ("./dir.with.dots/k1.cls", "1\n"),
        (f"{long}.json", '{"label": 0, "class": "Cat", "caption": "two"}'),
        (f"{long}.720p.MP4", video),
        ("k3.jpg", b"no video here"),
        ("._k1.mp4", b"debris"),
        ("k4.avi", video),
        ("k4.json", '{"label": 2}'),
    ]
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tar(tmp_path / f"{number}.tar", members, format=form)
        found = read_shards([path])
        files = found.files
        assert found.class_names == ["Cat", "1", "2"]
        assert [(f.label, f.caption) for f in files] == [(1, "über"), (0, "two"), (2, "")]
        assert files[0].path == f"{path}/dir.with.dots/k1.mp4"
        for file in files:
            with open(path, "rb") as source:
                source.seek(file.source.offset)
                assert source.read(file.source.size) == video


def test_classes(tmp_path, video):
    def names(*records, listed=None, cls=()):
        members = []
        for i, record in enumerate(records):
            members += [(f"{i}.mp4", video)] + ([(f"{i}.json", json.dumps(record))] if record is not None else [])
            members += [(f"{i}.cls", str(cls[i]))] if i < len(cls) else []
        (tmp_path / "classes.json").unlink(missing_ok=True)
        if listed is not None:
            (tmp_path / "classes.json").write_text(json.dumps(listed))
        found = read_shards([tar(tmp_path / "a.tar", members)])
        return found.class_names, [file.label for file in found.files]

    assert names(None, {}) == ([], [0, 0])
    assert names({"class": "b"}, {"class": "a"}) == (["a", "b"], [1, 0])
    assert names({"class": "b"}, {"class": "a"}, listed=["c", "b", "a"]) == (["c", "b", "a"], [1, 2])
    assert names({"class": "a"}, {}, cls=(3, 1)) == (["0", "1", "2", "a"], [3, 1])
    assert names({}, {}, listed=["c", "b"], cls=(1, 1)) == (["c", "b"], [1, 1])
    for records, options, match in [
        (({"class": "a"}, None), {}, r"a\.tar/1\.mp4: no label \(1 of 2 clips have none\)"),
        (({}, {}), {"listed": ["a"]}, r"0\.mp4: no label \(2 of 2"),
        (({"class": "b"},), {"listed": ["a"]}, r"0\.mp4: class 'b' is not one of the 1 classes"),
        (({},), {"listed": ["a"], "cls": (1,)}, r"0\.mp4: label 1 is not one of the 1 classes"),
        (({"class": "a"}, {"class": "b"}), {"cls": (0, 0)}, r"1\.mp4: class 'b' is not one of the 1 classes"),
        (({"class": "a"}, {"class": "a"}), {"cls": (0, 1)}, r"0\.mp4: got label 0 for class 'a', expected 1"),
        (({"label": 1},), {"cls": (0,)}, r"0\.cls': got 0, but the json says 1"),
        (({},), {"cls": ("Cat",)}, r"0\.cls': got 'Cat', expected an integer from 0 to 999999"),
        (({},), {"cls": ("",)}, r"0\.cls': got '', expected an integer"),
        (({},), {"cls": (10**6,)}, r"0\.cls': got '1000000', expected an integer"),
        (({"label": True},), {}, r"0\.json': label: got True, expected an integer"),
        (({"label": -1},), {}, r"0\.json': label: got -1"),
        (({"class": 3},), {}, r"0\.json': class: got 3, expected a text"),
        (({"caption": ["a"]},), {}, r"0\.json': caption: got \['a'\], expected a text"),
        (([1],), {}, r"0\.json': got \[1\], expected an object"),
        (({},), {"listed": {"a": 0}}, r"classes\.json: got an object, expected a list"),
    ]:
        with pytest.raises(ValueError, match=match):
            names(*records, **options)


def test_class_files_of_several_folders_must_agree(tmp_path, video):
    for name, listed in (("a", "1 Cat\n2 Dog\n"), ("b", "1 Dog\n2 Cat\n")):
        (tmp_path / name).mkdir()
        tar(tmp_path / name / "0.tar", [("k.mp4", video), ("k.cls", "1")])
        (tmp_path / name / "classInd.txt").write_text(listed)
    assert VideoDataset(tmp_path / "a", frames=4, size=8).class_names == ["Cat", "Dog"]
    with pytest.raises(ValueError, match=r"b/classInd\.txt and .*a/classInd\.txt list different classes"):
        VideoDataset(tmp_path / "{a,b}/0.tar", frames=4, size=8)


def test_bad_shards_are_named(tmp_path, copy, video):
    shard = copy / "shard-000001.tar"
    data = shard.read_bytes()
    entries = index_shard(shard).clips
    header = data.index(b"RedDisc/v_RedDisc_g02_c01.mp4")
    (copy / "shard-000001.tar.index.json").unlink()
    zeros = bytearray(data)
    zeros[header : header + 100] = b"\xff" * 100
    for content, match in [
        (
            data[: entries[1].offset + 50],
            r"shard-000001\.tar: .*cut off or damaged, in or after member 'RedDisc/v_.*mp4'",
        ),
        (data[: header + 200], r"cut off or damaged, in or after member 'RedDisc/v_RedDisc_g01_c01\.txt'"),
        (data[:header], r"in or after member 'RedDisc/v_RedDisc_g01_c01\.txt': no header and no end mark at byte"),
        (bytes(zeros), r"in or after member 'RedDisc/v_RedDisc_g01_c01\.txt': no header and no end mark at byte"),
        (b"", r"not an uncompressed tar, cut off or damaged, at its start"),
        (b"text" * 1000, r"not an uncompressed tar, cut off or damaged, at its start"),
        (bytes(10240), r"shard-000001\.tar: no videos in it, expected names ending in \.avi"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            VideoDataset(copy, frames=4, size=8)
        assert not list(copy.glob("shard-000001.tar.*")), "no index of a bad shard"
    with tarfile.open(shard, "w:gz") as out:
        out.add(copy / "classes.json", "a.mp4")
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        VideoDataset(copy, frames=4, size=8)
    tar(shard, [("a.mp4", video), ("a.mkv", video)])
    with pytest.raises(ValueError, match=r"shard-000001\.tar: 'a\.mkv' is the second video of its key, expected one"):
        VideoDataset(copy, frames=4, size=8)
    tar(shard, [("a.mp4", video), ("a.txt", b"caf\xe9"), ("a.cls", "0")])
    with pytest.raises(ValueError, match=r"member 'a\.txt': not UTF-8 text"):
        VideoDataset(copy, frames=4, size=8)
    tar(shard, [("a.mp4", video), ("a.cls", "0")])
    with pytest.raises(ValueError, match=r"captions: 1 of 6 clips of .*copy have none \(shard-000001\.tar/a\.mp4\)"):
        VideoDataset(copy, frames=4, size=8, captions=True)
    with pytest.raises(ValueError, match=r"split: got one for shards .* name its shards"):
        VideoDataset(copy, frames=4, size=8, split="train")
    (copy / "b.mp4").write_bytes(video)
    with pytest.raises(ValueError, match=r"root: .*copy holds videos beside shards \(shard-000000\.tar\)"):
        VideoDataset(copy, frames=4, size=8)


def test_a_damaged_member_is_skipped_like_a_damaged_file(copy, caplog):
    data = VideoDataset(copy, frames=4, size=8)
    member = data.files[4].source
    with open(member.archive, "r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.size))
    data = VideoDataset(copy, frames=4, size=8)
    item = data[ClipKey(4, 1)]
    assert re.search(r"clip skipped: .*shard-000001\.tar/RedDisc/v_RedDisc_g01_c01\.mp4: not a", caplog.text)
    assert torch.equal(item["video"], data[ClipKey(5, 1)]["video"])


def test_the_index_is_kept_and_follows_the_shard(copy, video, monkeypatch):
    path = copy / "shard-000000.tar"
    first = index_shard(path)
    kept = path.with_name("shard-000000.tar.index.json")
    stamp = kept.stat().st_mtime_ns
    monkeypatch.setattr(shard_index, "scan", lambda path: pytest.fail("read although its index is there"))
    assert index_shard(path) == first
    monkeypatch.undo()
    for damaged in ("", "{}", "[]", '{"version": 1', json.dumps({**json.loads(kept.read_text()), "version": 0})):
        kept.write_text(damaged)
        assert index_shard(path) == first
        assert json.loads(kept.read_text())["clips"][0]["name"] == first.clips[0].name
    tar(path, [("new.mp4", video), ("new.cls", "1")])
    assert [entry.name for entry in index_shard(path).clips] == ["new.mp4"]
    assert kept.stat().st_mtime_ns != stamp
    # In a folder that cannot be written to, nothing is kept and nothing fails.
    kept.unlink()

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(shard_index, "write_text", refuse)
    assert [entry.name for entry in index_shard(path).clips] == ["new.mp4"]
    assert not kept.exists()


@pytest.mark.parametrize("kind", ["folder", "shards"])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_workers_and_resume_anywhere(folder, packed, kind, workers):
    data = VideoDataset(
        {"folder": folder, "shards": packed}[kind], frames=4, size=(8, 12), cache_bytes=10**9, seed=2, captions=True
    )
    alone = VideoDataset(folder, frames=4, size=(8, 12), seed=2, captions=True)
    # Seven clips of eight per step: epochs end inside of batches. The run is cut after step 2.
    steps = [
        batch
        for first, count in ((0, 2), (2, 3))
        for batch, _ in zip(
            DataLoader(data, batch_sampler=MicroBatches(8, 7, 7, 2, first), num_workers=workers), range(count)
        )
    ]
    order = MicroBatches(8, 7, 7, 2).order
    for step, batch in enumerate(steps):
        items = [alone[key] for key in order.keys(step)]
        assert torch.equal(batch["video"], torch.stack([item["video"] for item in items]))
        for name in ("label", "start"):
            assert batch[name].tolist() == [item[name] for item in items]
        assert batch["caption"] == [item["caption"] for item in items]


def test_packing(folder, packed, tmp_path, capsys):
    again = tmp_path / "again"
    assert Shard(folder, again, clips_per_shard=3).run() == 0
    assert f"{again}: 3 shards, 8 clips of 2 classes, 8 with a caption" in capsys.readouterr().out
    for path in sorted(packed.glob("*.tar")):
        assert (again / path.name).read_bytes() == path.read_bytes(), "equal files in equal shards"
    with tarfile.open(again / "shard-000002.tar") as out:
        assert out.getnames()[:3] == [f"RedDisc/v_RedDisc_g03_c01.{kind}" for kind in ("mp4", "cls", "txt")]
        source = folder / out.getnames()[0]
        assert out.extractfile(out.getnames()[0]).read() == source.read_bytes()
    assert Shard(folder, tmp_path / "test", split="test").run() == 0
    assert VideoDataset(tmp_path / "test", frames=4, size=8).labels == [0, 1], "in the order of testlist01.txt"
    assert Inspect(again / "shard-00000{0..1}.tar", full=True).run() == 0
    text = capsys.readouterr().out
    assert "shard-000000.tar/CyanDiamond/v_CyanDiamond_g01_c01.mp4  CyanDiamond  8 frames 32x16" in text
    assert "6 files of 2 classes: 6 read with decord" in text
    assert Inspect(again / "shard-000002.tar", frames=9).run() == 1
    with pytest.raises(ValueError, match="holds shards already"):
        Shard(again, tmp_path / "third").run()
    with pytest.raises(FileExistsError, match="again is not empty"):
        Shard(folder, again).run()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Shard(folder, tmp_path / "nowhere" / "out").run()
    with pytest.raises(ValueError, match="clips_per_shard: got 0"):
        Shard(folder, tmp_path / "third", clips_per_shard=0).run()


def test_packing_a_flat_folder_without_labels(tmp_path, video):
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("a.b.mp4", "c.MP4"):
        (flat / name).write_bytes(video)
    (flat / "c.txt").write_text("a caption")
    assert Shard(flat, tmp_path / "out").run() == 0
    data = VideoDataset(tmp_path / "out", frames=4, size=8)
    assert (data.labels, [os.path.basename(file.path) for file in data.files]) == (None, ["a_b.mp4", "c.mp4"])
    assert [file.caption for file in find_clips(tmp_path / "out", captions=True)[1]] == ["", "a caption"]
    (flat / "a_b.avi").write_bytes(video)
    with pytest.raises(ValueError, match=r"a\.b\.mp4 and .*a_b\.avi both have the key 'a_b'"):
        Shard(flat, tmp_path / "other").run()


def test_packing_that_fails_leaves_nothing(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "set")
    names, files = find_clips(source)
    os.unlink(files[-1].path)
    with pytest.raises(FileNotFoundError):
        write_shards(tmp_path / "out", source, names, files, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
