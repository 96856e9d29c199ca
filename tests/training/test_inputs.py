"""A run that goes on has the clips, captions and embeddings that it began with, or says what changed."""

import gzip
import json
import logging
import os
import shutil
import tarfile

import pytest
import torch

from hpdm.commands.data import Shard
from hpdm.commands.train import prepare, train
from hpdm.data import fingerprint
from hpdm.data.fingerprint import ClipRecord, differences
from hpdm.text import EmbeddingInfo, EmbeddingStore
from tests.small import change_config
from tests.small import train_options as options


def training_of(run):
    return json.loads((run / "config.json").read_text())["training"]


def change_training(run, change):
    change_config(run, lambda config: change(config["training"]))


@pytest.fixture
def run(saved_run, tmp_path):
    return shutil.copytree(saved_run, tmp_path / "run")


@pytest.fixture
def copy(clips, tmp_path):
    """The clips in another place, written in another order, and with other times."""
    for file in sorted(clips.rglob("*"), reverse=True):
        if file.is_file():
            target = tmp_path / "copy" / file.relative_to(clips)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
            os.utime(target, (1e9, 1e9))
    return tmp_path / "copy"


def videos(root, name):
    return sorted((root / name).glob("*.mp4"))


def swap_names(root):
    for old, new in (("RedDisc", "x"), ("GreenSquare", "RedDisc"), ("x", "GreenSquare")):
        (root / old).rename(root / new)


CHANGES = {
    "removed": (lambda root: videos(root, "RedDisc")[1].unlink(), r"^data: 1 removed \(RedDisc/\S+\.mp4\)"),
    "added": (
        lambda root: shutil.copy(videos(root, "RedDisc")[0], root / "RedDisc" / "zz.mp4"),
        r"^data: 1 added \(RedDisc/zz\.mp4\)",
    ),
    "renamed": (
        lambda root: videos(root, "RedDisc")[0].rename(root / "RedDisc" / "zz.mp4"),
        r"^data: 1 renamed \(RedDisc/\S+\.mp4 -> RedDisc/zz\.mp4\)",
    ),
    "cut off": (
        lambda root: os.truncate(videos(root, "RedDisc")[2], 1000), r"^data: 1 of another size \(RedDisc/\S+\.mp4\)",
    ),
    "classes swapped": (swap_names, r"^data: [36] "),
}  # fmt: skip


@pytest.mark.parametrize("how", CHANGES)
def test_other_clips_are_refused_and_named(copy, run, how):
    change, message = CHANGES[how]
    change(copy)
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message + r".*; expected what the run at \S+ had, or --data-changed to go on"):
        train(options(copy, run))
    assert (run / "config.json").read_bytes() == before


def test_the_same_clips_in_another_place_are_the_same(copy, run, caplog):
    with caplog.at_level(logging.INFO, "hpdm.commands"):
        train(options(copy, run))
    assert "goes on" not in caplog.text
    assert training_of(run)["history"] == []


def test_clips_may_be_packed_into_shards(copy, run, tmp_path):
    """Dots in names, which separate a key from its kind in a shard, are no other name."""
    videos(copy, "RedDisc")[0].rename(copy / "RedDisc" / "a.b.MP4")
    train(options(copy, run, data_changed=True))
    Shard(copy, tmp_path / "shards", clips_per_shard=4).run()
    train(options(tmp_path / "shards", run))
    Shard(copy, tmp_path / "larger", clips_per_shard=6).run()
    train(options(tmp_path / "larger", run))
    assert len(training_of(run)["history"]) == 1
    shutil.copytree(tmp_path / "larger", tmp_path / "other", ignore=shutil.ignore_patterns("shard*"))
    packed, fewer = tmp_path / "larger" / "shard-000000.tar", tmp_path / "other" / "a.tar"
    with tarfile.open(packed) as source, tarfile.open(fewer, "w") as target:
        for member in source.getmembers()[3:]:
            target.addfile(member, source.extractfile(member))
    with pytest.raises(ValueError, match=r"^data: 1 removed \(\S+\.mp4\)"):
        train(options(tmp_path / "other", run))


def test_a_change_that_is_accepted_is_kept_in_the_history(copy, run, caplog):
    before = training_of(run)["provenance"]["inputs"]["data"]
    videos(copy, "RedDisc")[1].unlink()
    with caplog.at_level(logging.WARNING, "hpdm.commands"):
        train(options(copy, run, data_changed=True, steps=7))
    now = training_of(run)["provenance"]["inputs"]["data"]
    assert (before.split()[0], now.split()[0]) == ("6", "5")
    entry = {"step": 6, "changes": {"steps": [6, 7], "data": [before, now]}}
    assert training_of(run)["history"] == [entry]
    assert f"goes on from step 6 with steps: 6 -> 7, data: {before} -> {now}" in caplog.text
    assert "data_changed" not in training_of(run)
    train(options(copy, run, steps=7))  # the clips are the run's now
    assert training_of(run)["history"] == [entry]


def test_each_set_and_the_validation_count(clips, copy, tmp_path):
    run = tmp_path / "run"
    both = {"data": [clips, f"{copy}:0.5"], "steps": 1}
    held_out = shutil.copytree(copy, tmp_path / "held_out")
    validated = both | {"validate_every": 1, "validation": held_out, "validation_clips": 2}
    train(options(clips, run, **both))
    assert list(training_of(run)["provenance"]["inputs"]) == ["data 1", "data 2"]
    train(options(clips, run, **validated))  # it may begin at any time
    videos(held_out, "RedDisc")[0].unlink()
    with pytest.raises(ValueError, match=r"^validation: 1 removed \(RedDisc/"):
        train(options(clips, run, **validated))
    train(options(clips, run, **validated | {"validation": clips}))  # asked for: other clips
    train(options(clips, run, **both))
    os.truncate(videos(copy, "GreenSquare")[0], 1000)
    with pytest.raises(ValueError, match=r"^data 2: 1 of another size \(GreenSquare/\S+\); expected"):
        train(options(clips, run, **both))


def test_captions_and_embeddings_count(copy, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "embeddings"
    lines = (copy / "captions.jsonl").read_text().splitlines()
    texts = sorted({json.loads(line)["caption"] for line in lines})

    def embed(seed, *more):
        shutil.rmtree(folder, ignore_errors=True)
        store = EmbeddingStore.create(folder, EmbeddingInfo("random", 24, 8, "fp32"))
        made = torch.Generator().manual_seed(seed)
        store.add(texts, [torch.randn(2, 24, generator=made) for _ in texts])
        if more:
            store.add([*more], [torch.randn(1, 24) for _ in more])

    def go_on(**changes):
        train(options(copy, run, embeddings=folder, steps=1, **changes))

    embed(0)
    go_on()
    embed(0, "a caption of no clip")
    go_on()
    embed(1)
    with pytest.raises(ValueError, match=r"^embeddings: random, \w+ -> random, \w+; expected"):
        go_on()
    embed(0, "another text")
    first = json.loads(lines[0])
    (copy / "captions.jsonl").write_text("\n".join([json.dumps(first | {"caption": "another text"}), *lines[1:]]))
    with pytest.raises(ValueError, match=rf"^data: 1 with another caption \({first['file']}\); "):
        go_on()
    go_on(data_changed=True)
    assert set(training_of(run)["history"][0]["changes"]) == {"data", "embeddings"}


def test_names_and_sizes_are_those_of_the_files_and_labels_count_where_there_are_classes(clips, tmp_path):
    """They are the places in ``classInd.txt``; names alone are compared before."""
    for conditioned in (True, False):
        root = shutil.copytree(clips, tmp_path / f"{conditioned}")
        data = prepare(options(root, tmp_path / "run")).dataset.sets[0]
        records = list(fingerprint.ClipSet(data, labeled=conditioned).records())
        assert {record.label for record in records} == ({0, 1} if conditioned else {0})
        there = sorted((path.relative_to(root).as_posix(), path.stat().st_size) for path in root.rglob("*.mp4"))
        assert sorted(record[:2] for record in records) == there


def test_runs_without_a_record_get_one(clips, run, caplog):
    recorded = training_of(run)["provenance"]
    change_training(run, lambda training: training.pop("provenance"))
    (run / fingerprint.LIST_FILE).unlink()
    with caplog.at_level(logging.INFO, "hpdm.commands"):
        train(options(clips, run))
    assert f"{run} has no record of its clips and versions" in caplog.text
    assert training_of(run)["provenance"] == recorded
    assert (run / fingerprint.LIST_FILE).is_file()


@pytest.mark.parametrize("damage", ["missing", "cut", "garbage", "other", "no list"])
def test_without_the_list_a_change_is_told_by_its_numbers(copy, run, damage, monkeypatch):
    path = run / fingerprint.LIST_FILE
    whole = path.read_bytes()
    if damage == "no list":
        monkeypatch.setattr(fingerprint, "MOST_LISTED", 5)
        train(options(copy, run))
        assert not path.exists()
    else:
        path.unlink()
    if damage in ("cut", "garbage"):
        path.write_bytes(whole[:-20] if damage == "cut" else whole[:30] + b"\0" * 40 + whole[70:])
    elif damage == "other":
        path.write_bytes(gzip.compress(b'["data", "a.mp4", 1, 0, ""]\n'))
    videos(copy, "RedDisc")[0].unlink()
    with pytest.raises(ValueError, match=r"^data: 6 clips, \w{16} -> 5 clips, \w{16}; expected what the run"):
        train(options(copy, run))


def test_the_list_is_written_anew_where_it_is_damaged(clips, run):
    path = run / fingerprint.LIST_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    train(options(clips, run))
    assert path.read_bytes() == whole


def test_other_versions_are_named_in_one_line(clips, run, caplog):
    def change(training):
        training["provenance"]["environment"] |= {
            "torch": "1.0",
            "threads": 77,
            "processes": 8,
            "av": "0.1",
            "gone": "3",
        }

    recorded = training_of(run)["provenance"]
    assert {"hpdm", "torch", "av", "libavcodec", "sources", "processes", "threads"} <= set(recorded["environment"])
    change_training(run, change)
    with caplog.at_level(logging.INFO, "hpdm.commands"):
        train(options(clips, run))
    said = [record.getMessage() for record in caplog.records if record.name == "hpdm.commands.provenance"]
    now = recorded["environment"]
    assert len(said) == 1
    for text in (
        f"torch: 1.0 -> {now['torch']}",
        f"threads: 77 -> {now['threads']}",
        "processes: 8 -> 1",
        "gone: 3 -> None",
    ):
        assert text in said[0]
    assert training_of(run)["provenance"] == recorded


def test_a_damaged_record_is_named(clips, run):
    change_training(run, lambda training: training.update(provenance=[1]))
    with pytest.raises(ValueError, match=r"config\.json: provenance: got \[1\], expected inputs and environment"):
        train(options(clips, run))


def records(*names, size=1, label=0, caption=""):
    return [ClipRecord(name, size, label, caption) for name in names]


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (records(*"abcde"), records("c"), "4 removed (a, b, d, ...)"),
        (records("a", "b"), records("b", "a"), "another order"),
        (records("a", "b"), records("b", "c"), "1 renamed (a -> c)"),
        (records("a") + records("b", size=2), records("c", size=3), "2 removed (a, b), 1 added (c)"),
        (records("a"), records("a", label=1, caption="x"), "1 of another class (a), 1 with another caption (a)"),
        (records("a", "a"), records("a"), "1 removed (a)"),  # shards may repeat a name
        (records("a", "a"), records("a") + records("a", size=2), "1 of another size (a)"),
    ],
)
def test_differences_are_counted_and_named(before, now, expected):
    assert differences(before, now) == expected
    assert fingerprint.fingerprint(before) != fingerprint.fingerprint(now)
