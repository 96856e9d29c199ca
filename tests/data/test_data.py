"""Sets of videos: layouts, windows that depend on (seed, epoch, index) alone, damaged and short clips, the sampler."""

import dataclasses
import functools
import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hpdm import distributed
from hpdm.commands.data import Inspect, Synthetic
from hpdm.data import clips as data_module
from hpdm.data import decoder_process
from hpdm.data.clips import ShortClipError, VideoDataset
from hpdm.data.decode import DecodeError
from hpdm.data.decoder_process import DecoderProcess
from hpdm.data.layout import find_videos
from hpdm.data.order import ClipKey, ClipOrder
from hpdm.data.resize import resize_and_crop
from hpdm.data.synthetic import render_synthetic
from hpdm.training.batches import MicroBatches
from hpdm.video import write_video


def numbered(frames, height=16, width=16):
    """Frame t is gray of brightness 4 t + 16, so a window's start can be read off."""
    return torch.arange(frames, dtype=torch.uint8).mul(4).add(16).view(1, -1, 1, 1).expand(3, -1, height, width)


def first_frame(item):
    return round((float(item["video"][:, 0].float().mean()) - 16) / 4)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "set"
    return render_synthetic(out, clips=4, frames=12, size=(16, 32), classes=["RedDisc", "CyanDiamond"])


@pytest.fixture
def flat(tmp_path):
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(4):
        write_video(root / f"{i}.mp4", numbered(10 + i), crf=5)
    return root


def test_class_folders(synthetic):
    data = VideoDataset(synthetic, frames=4, size=(8, 16))
    assert data.class_names == ["RedDisc", "CyanDiamond"], "classInd.txt decides, not the alphabet"
    assert len(data) == 8
    assert data.labels == [1] * 4 + [0] * 4
    item = data[0]
    assert (item["video"].shape, item["video"].dtype) == ((3, 4, 8, 16), torch.uint8)
    assert item["video"].is_contiguous()
    assert (item["label"], item["decoder"]) == (1, "decord")
    assert item["path"].endswith("CyanDiamond/v_CyanDiamond_g01_c01.mp4")


def test_class_folders_without_an_index(synthetic, tmp_path):
    shutil.copytree(synthetic, tmp_path / "set", ignore=shutil.ignore_patterns("ucf*"))
    data = VideoDataset(tmp_path / "set", frames=4, size=8)
    assert data.class_names == ["CyanDiamond", "RedDisc"]
    assert data.labels == [0] * 4 + [1] * 4


def test_official_splits(synthetic, tmp_path):
    train, test = (VideoDataset(synthetic, frames=4, size=8, split=split) for split in ("train", "test"))
    assert {file.path for file in train.files} | {file.path for file in test.files} == {
        file.path for file in VideoDataset(synthetic, frames=4, size=8).files
    }
    assert len(train) == 6
    assert len(test) == 2
    assert train.labels == [0, 0, 0, 1, 1, 1]
    # The split files may lie beside the videos' folder, and list avi where the copies are mp4.
    beside = tmp_path / "UCF-101"
    shutil.copytree(synthetic, beside, ignore=shutil.ignore_patterns("ucf*"))
    shutil.copytree(synthetic / "ucfTrainTestlist", tmp_path / "ucfTrainTestlist")
    for path in (tmp_path / "ucfTrainTestlist").glob("*list01.txt"):
        path.write_text(path.read_text().replace(".mp4", ".avi"))
    for options in ({"split": "test"}, {"split_file": tmp_path / "ucfTrainTestlist" / "testlist01.txt"}):
        again = VideoDataset(beside, frames=4, size=8, **options)
        assert again.labels == test.labels
        assert torch.equal(again[1]["video"], test[1]["video"])


def test_captions_of_a_set(synthetic):
    with_captions = VideoDataset(synthetic, frames=4, size=8, split="test", captions=True)
    caption = with_captions[1]["caption"]
    assert "cyan diamond" in caption
    assert VideoDataset(synthetic, frames=4, size=8)[0]["caption"] == ""
    record = json.dumps({"file": "CyanDiamond/v_CyanDiamond_g01_c01.mp4", "caption": caption})
    assert record in (synthetic / "captions.jsonl").read_text().splitlines()


def test_captions_beside_the_clips_and_in_one_file(flat):
    for i in range(3):
        (flat / f"{i}.txt").write_text(f" número {i}\r\n", encoding="utf-8")
    build = functools.partial(VideoDataset, flat, frames=4, size=16)
    with pytest.raises(ValueError, match=r"captions: 1 of 4 clips of .*flat have none \(3\.mp4\), expected"):
        build(captions=True)
    (flat / "captions.jsonl").write_text(
        '{"file": "3.mp4", "caption": "three"}\n{"file": "gone.mp4", "caption": "x"}\n'
    )
    data = build(captions=True)
    assert [data[i]["caption"] for i in range(4)] == ["número 0", "número 1", "número 2", "three"]
    for i in range(3):
        (flat / f"{i}.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"3 of 4 clips of .* have none \(0\.mp4, 1\.mp4, 2\.mp4\)"):
        build(captions=True)
    (flat / "0.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"0\.txt: not UTF-8 text: .* at byte 3"):
        build(captions=True)
    for line, match in (
        ("3.mp4 three", r"not JSON \("),
        ('{"file": "3.mp4"}', "got no 'caption', expected an object with caption, file$"),
        ('{"file": 3, "caption": "three"}', "file: got 3, expected a text$"),
        ('["3.mp4", "three"]', r"got \['3.mp4', 'three'\], expected an object$"),
    ):
        (flat / "captions.jsonl").write_text(f"\n{line}\n")
        with pytest.raises(ValueError, match=rf"captions\.jsonl:2: {match}"):
            build(captions=True)
    (flat / "captions.jsonl").write_text('{"file": "3.mp4", "caption": "three"}\n' * 2)
    with pytest.raises(ValueError, match=r"captions\.jsonl:2: 3\.mp4 has a caption already"):
        build(captions=True)
    assert build()[0]["caption"] == ""


def test_flat_folder(flat):
    (flat / ".0.1-2.tmp.mp4").write_bytes(b"half")
    (flat / "notes.txt").write_text("no video")
    data = VideoDataset(flat, frames=4, size=16)
    assert (len(data), data.class_names, data.labels) == (4, [], None)
    assert {data[i]["label"] for i in range(4)} == {0}


@pytest.mark.parametrize(("stride", "train"), [(1, True), (3, True), (1, False), (2, False)])
def test_window_holds_the_frames_from_its_start(flat, stride, train):
    data = VideoDataset(flat, frames=3, size=16, stride=stride, train=train)
    for index in range(4):
        for epoch in range(3):
            item = data[ClipKey(index, epoch)]
            length = 10 + index
            span = 2 * stride + 1
            assert 0 <= item["start"] <= length - span
            assert brightness(item) == [item["start"] + stride * i for i in range(3)]
            if not train:
                assert item["start"] == (length - span) // 2


def brightness(item):
    return ((item["video"].float().mean((0, 2, 3)) - 16) / 4).round().int().tolist()


def test_clips_of_any_rate_and_size_are_resampled_to_one(tmp_path):
    """Brightness tells the frame, so a window's motion per second can be read off."""
    for name, rate, size in (("a", 10, (16, 16)), ("b", 20, (24, 40)), ("c", 30, (10, 64)), ("d", 25, (17, 33))):
        write_video(tmp_path / f"{name}.mp4", numbered(40, *size), rate, crf=5)
    data = VideoDataset(tmp_path, frames=5, size=(8, 12), fps=10, train=False)
    assert [data[i]["video"].shape for i in range(4)] == [(3, 5, 8, 12)] * 4
    for index, steps in enumerate(([0, 1, 2, 3, 4], [0, 2, 4, 6, 8], [0, 3, 6, 9, 12], [0, 3, 5, 8, 10])):
        first = (40 - steps[-1] - 1) // 2
        assert brightness(data[index]) == [first + step for step in steps]
    halved = VideoDataset(tmp_path, frames=5, size=8, fps=5, stride=2, train=False, short="loop")
    assert brightness(halved[0]) == [11, 15, 19, 23, 27]
    assert brightness(halved[2]) == [0, 12, 24, 36, 8], "a loop goes on from the first frame"
    doubled = VideoDataset(tmp_path, frames=5, size=8, fps=20)
    for epoch in range(8):
        item = doubled[ClipKey(0, epoch)]
        assert brightness(item) == [item["start"] + step for step in (0, 1, 1, 2, 2)]
        assert 0 <= item["start"] <= 37
    with pytest.raises(
        ShortClipError, match=r"c\.mp4: got 40 frames, expected >= 49 \(frames=5, stride=4, fps=10 of 30"
    ):
        VideoDataset(tmp_path, frames=5, size=8, fps=10, stride=4, short="error")[2]
    for rate in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"fps: got {rate}, expected > 0"):
            VideoDataset(tmp_path, frames=5, size=8, fps=rate)


def test_rates_that_differ_are_told_once(flat, caplog):
    alike = VideoDataset(flat, frames=4, size=16)
    assert [alike[i]["start"] >= 0 for i in range(4)] == [True] * 4
    assert not caplog.records
    write_video(flat / "1.mp4", numbered(12), 25)
    write_video(flat / "2.mp4", numbered(12), 50)
    data = VideoDataset(flat, frames=4, size=16)
    assert len([data[ClipKey(i, epoch)] for epoch in range(2) for i in range(4)]) == 8
    assert len(caplog.records) == 1
    assert re.search(r"1\.mp4: 25, .*0\.mp4: 16 frames per second.*pass fps", caplog.text)


def test_a_clip_without_a_rate_cannot_be_resampled(flat, monkeypatch):
    real = data_module.probe
    monkeypatch.setattr(data_module, "probe", lambda *a, **k: dataclasses.replace(real(*a, **k), fps=0.0))
    assert VideoDataset(flat, frames=4, size=16)[0]["start"] >= 0
    data = VideoDataset(flat, frames=4, size=16, fps=8)
    with pytest.raises(DecodeError, match=r"none of the 4 .*0\.mp4: nothing tells its frame rate, which fps=8"):
        data[0]


def test_windows_depend_on_seed_epoch_and_index_alone(flat):
    def starts(data, keys):
        return [data[key]["start"] for key in keys]

    keys = [ClipKey(index, epoch) for epoch in range(8) for index in range(4)]
    expected = starts(VideoDataset(flat, frames=2, size=16, seed=5), keys)
    shuffled = VideoDataset(flat, frames=2, size=16, seed=5)
    order = np.random.default_rng(torch.seed() % 2**32).permutation(len(keys))
    got = starts(shuffled, [keys[i] for i in order])
    assert got == [expected[i] for i in order]
    assert starts(VideoDataset(flat, frames=2, size=16, seed=6), keys) != expected
    assert len(set(expected[::4])) > 2, "epochs draw different windows"
    assert shuffled[2]["start"] == shuffled[ClipKey(2, 0)]["start"] == shuffled[-2]["start"]


def test_all_starts_are_drawn(flat):
    data = VideoDataset(flat, frames=8, size=16, cache_bytes=10**9)
    assert {data[ClipKey(0, epoch)]["start"] for epoch in range(60)} == {0, 1, 2}


@pytest.mark.usefixtures("weightless")
@pytest.mark.parametrize(("context", "workers"), [(None, 0), ("fork", 2), ("spawn", 1)])
def test_batches_do_not_depend_on_the_number_of_processes(flat, context, workers):
    data = VideoDataset(flat, frames=4, size=(8, 12), cache_bytes=3000)
    sampler = MicroBatches(len(data), 3, 3, seed=1, start=2)
    loader = iter(DataLoader(data, batch_sampler=sampler, num_workers=workers, multiprocessing_context=context))
    plain = VideoDataset(flat, frames=4, size=(8, 12))
    for step in range(2, 6):
        batch = next(loader)
        items = [plain[key] for key in sampler.order.keys(step)]
        assert torch.equal(batch["video"], torch.stack([item["video"] for item in items]))
        assert batch["start"].tolist() == [item["start"] for item in items]
        assert batch["path"] == [item["path"] for item in items]


@pytest.fixture
def weightless(monkeypatch):
    """Decoding processes that take nothing of the cache's memory."""
    monkeypatch.setattr(DecoderProcess, "memory", lambda self: 0)


def test_the_decoder_counts_as_memory_of_the_cache(flat, monkeypatch):
    clips = VideoDataset(flat, frames=3, size=8, cache_bytes=10**9)
    assert clips[0]["start"] >= 0
    taken = decoder_process.process.memory()
    assert 2**24 < taken < 2**28, "an interpreter and its codecs"
    one_clip = 13 * 8 * 8 * 3
    for extra, kept in ((0, 0), (one_clip, 1)):
        monkeypatch.setattr(DecoderProcess, "memory", lambda self: taken)
        data = VideoDataset(flat, frames=3, size=8, cache_bytes=taken + extra)
        assert data[3]["start"] >= 0
        assert len(data._cache.clips) == kept


@pytest.mark.usefixtures("weightless")
def test_cache_is_bounded_and_changes_nothing(flat):
    one_clip = 13 * 8 * 8 * 3
    plain, small, large = (VideoDataset(flat, frames=3, size=8, cache_bytes=n) for n in (0, one_clip, 10**6))
    for key in [ClipKey(i, epoch) for epoch in range(3) for i in range(4)]:
        items = [data[key] for data in (plain, small, large)]
        assert torch.equal(items[0]["video"], items[1]["video"])
        assert torch.equal(items[0]["video"], items[2]["video"])
    assert [len(data._cache.clips) for data in (plain, small, large)] == [0, 1, 4]
    assert small._cache.used == sum(v.numel() for v, _ in small._cache.clips.values()) <= one_clip
    assert pickle.loads(pickle.dumps(large))._cache.clips == {}
    before = large[1]["video"].clone()
    large[1]["video"].zero_()
    assert torch.equal(large[1]["video"], before), "an item never shares memory with the cache"


def test_resize_keeps_the_aspect_and_crops_the_center(generator):
    frames = torch.randint(0, 256, (2, 20, 41, 3), generator=generator, dtype=torch.uint8)
    assert resize_and_crop(frames, (20, 41)) is not None
    assert torch.equal(resize_and_crop(frames, (20, 41)), frames)
    assert torch.equal(resize_and_crop(frames, (20, 20)), frames[:, :, 10:30])
    halved = resize_and_crop(frames, (10, 10)).float()
    area = torch.nn.functional.interpolate(
        frames.permute(0, 3, 1, 2).float(), (10, 20), mode="bilinear", antialias=True
    )
    assert (halved - area.permute(0, 2, 3, 1)[:, :, 5:15]).abs().max() < 2
    for height, width, size in [(9, 33, (7, 7)), (5, 5, (16, 8)), (3, 100, (64, 64)), (720, 405, (64, 36))]:
        out = resize_and_crop(torch.full((1, height, width, 3), 77, dtype=torch.uint8), size)
        assert out.shape == (1, *size, 3)
        assert (out == 77).all()


def test_short_clips(flat, caplog):
    options = {"frames": 6, "stride": 2, "size": 16}
    data = VideoDataset(flat, short="error", **options)  # spans 11 frames; 0.mp4 has 10
    with pytest.raises(ShortClipError, match=r"0\.mp4: got 10 frames, expected >= 11 \(frames=6, stride=2\)"):
        data[0]
    assert data[1]["path"].endswith("1.mp4")
    data = VideoDataset(flat, **options)
    assert data[0]["path"].endswith("1.mp4")
    assert re.search(r"clip skipped: .*0\.mp4: got 10 frames", caplog.text)
    item = VideoDataset(flat, short="loop", **options)[0]
    assert item["start"] == 0
    assert ((item["video"].float().mean((0, 2, 3)) - 16) / 4).round().tolist() == [0, 2, 4, 6, 8, 0]
    data = VideoDataset(flat, frames=50, size=16, short="skip")
    with pytest.raises(DecodeError, match=r"none of the 4 clips can be used; the first: .*0\.mp4"):
        data[0]


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "gone"])
def test_a_damaged_clip_is_replaced_by_the_next_and_the_log_says_so(flat, damage, caplog):
    data = VideoDataset(flat, frames=4, size=16)
    bad = flat / "2.mp4"
    content = {"text": b"not a video", "empty": b"", "cut": bad.read_bytes()[:-300]}
    bad.write_bytes(content[damage]) if damage in content else bad.unlink()
    item = data[ClipKey(2, 7)]
    assert torch.equal(item["video"], data[ClipKey(3, 7)]["video"])
    assert torch.equal(data[ClipKey(2, 7)]["video"], item["video"])
    assert len(caplog.records) == 1
    assert re.search(r"clip skipped: .*2\.mp4", caplog.text)
    data = VideoDataset(flat, frames=4, size=16)
    (flat / "3.mp4").write_text("also bad")
    assert torch.equal(data[ClipKey(2, 7)]["video"], data[ClipKey(0, 7)]["video"])


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_clip_that_changes_under_a_run_is_replaced(flat, change, cache_bytes, caplog):
    data = VideoDataset(flat, frames=4, size=16, cache_bytes=cache_bytes)
    data._examine(2)
    if change == "gone":
        (flat / "2.mp4").unlink()
    else:
        write_video(flat / "2.mp4", numbered(2))
    reason = {"gone": "is not a file", "shorter": "asked, the video has 2"}[change]
    assert torch.equal(data[ClipKey(2, 1)]["video"], data[ClipKey(3, 1)]["video"])
    assert re.search(rf"clip skipped: .*2\.mp4.* {reason}", caplog.text)


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_a_damaged_window_does_not_spoil_its_clip(tmp_path, generator, cache_bytes, caplog):
    """What a clip gives must not depend on the windows that were read before, or a resumed run would differ."""
    noise = torch.randint(0, 256, (3, 60, 32, 32), generator=generator, dtype=torch.uint8)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, noise)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    late = data.index(b"mdat") + (len(data) - data.index(b"mdat")) * 3 // 4
    data[late : late + 3000] = bytes(3000)
    (tmp_path / "a.mp4").write_bytes(data)

    def paths(keys):
        data = VideoDataset(tmp_path, frames=4, size=32, decoder="pyav", cache_bytes=cache_bytes)
        return {key: data[key]["path"][-5:] for key in keys}

    keys = [ClipKey(0, epoch) for epoch in range(12)]
    forward, backward = paths(keys), paths(keys[::-1])
    assert caplog.text.count("clip skipped: ") == 2
    assert forward == backward
    assert set(forward.values()) == {"a.mp4", "b.mp4"}


def test_none_left(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_text("not a video")
    data = VideoDataset(tmp_path, frames=4, size=16)
    with pytest.raises(DecodeError, match=r"none of the 3 clips can be used; the first: .*1\.mp4"):
        data[1]


def test_bad_folders_and_arguments(tmp_path, flat, synthetic):
    def build(root, **options):
        return VideoDataset(root, **{"frames": 4, "size": 16, **options})

    (tmp_path / "empty").mkdir()
    for root, options, error, match in [
        (tmp_path / "missing", {}, FileNotFoundError, "root: .*missing is not a folder"),
        (tmp_path / "empty", {}, ValueError, "root: no videos in .*empty"),
        (flat / "0.mp4", {}, FileNotFoundError, "is not a folder"),
        (flat, {"split": "train"}, FileNotFoundError, r"split: no trainlist01\.txt in "),
        (synthetic, {"split": "train", "fold": 2}, FileNotFoundError, r"split: no trainlist02\.txt in "),
        (synthetic, {"split_file": tmp_path / "no.txt"}, FileNotFoundError, "split_file: .*no.txt is not a file"),
        (flat, {"split_file": synthetic / "ucfTrainTestlist/trainlist01.txt"}, ValueError, "has no class folders"),
        (flat, {"frames": 0}, ValueError, "frames: got 0"),
        (flat, {"stride": 0}, ValueError, "stride: got 0"),
        (flat, {"size": (16, 0)}, ValueError, "size: got 0"),
        (flat, {"seed": -1}, ValueError, "seed: got -1"),
        (flat, {"cache_bytes": -1}, ValueError, "cache_bytes: got -1"),
        (flat, {"short": "pad"}, ValueError, "short: got 'pad'"),
        (flat, {"split": "val"}, ValueError, "split: got 'val'"),
        (flat, {"decoder": "cv2"}, ValueError, "decoder: got 'cv2'"),
        (flat, {"split": "train", "split_file": "x"}, ValueError, "split_file: got both"),
    ]:
        with pytest.raises(error, match=match):
            build(root, **options)
    with pytest.raises(IndexError, match="index: got 4"):
        build(flat)[4]
    (flat / "Class").mkdir()
    shutil.copy(flat / "0.mp4", flat / "Class")
    with pytest.raises(ValueError, match="videos beside class folders"):
        build(flat)


def test_bad_split_files_name_the_line(synthetic, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(synthetic, root)
    good = "RedDisc/v_RedDisc_g01_c01.mp4 1"
    for text, error, match in [
        (
            f"{good}\nCat/v_Cat_g01_c01.avi 3\n",
            ValueError,
            r"trainlist01\.txt:2: class 'Cat' is not one of the 2 classes",
        ),
        (f"{good}\nRedDisc/v_RedDisc_g99_c01.avi 1\n", FileNotFoundError, r"trainlist01\.txt:2: .*g99.*does not exist"),
        ("RedDisc/v_RedDisc_g01_c01.mp4 2\n", ValueError, r"trainlist01\.txt:1: got label 2 for RedDisc, expected 1"),
        ("\n", ValueError, "lists no clips"),
        (f"{good}\nv_RedDisc_g01_c01\n", ValueError, r"trainlist01\.txt:2: got 'v_Red.*', expected 'Class/clip\.avi'"),
        ("path,label\n", ValueError, r"trainlist01\.txt:1: got 'path,label', expected 'Class/clip\.avi' or"),
        ("RedDisc/a.avi RedDisc\n", ValueError, r"trainlist01\.txt:1: got .* expected 'Class/clip\.avi' or"),
        ("RedDisc/a b.avi 1\n", FileNotFoundError, r"trainlist01\.txt:1: .*RedDisc/a b\.avi does not exist"),
    ]:
        (root / "ucfTrainTestlist/trainlist01.txt").write_text(text)
        with pytest.raises(error, match=match):
            find_videos(root, root / "ucfTrainTestlist/trainlist01.txt")
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 RedDisc\n3 CyanDiamond\n")
    with pytest.raises(ValueError, match=r"classInd\.txt:2: got '3 CyanDiamond', expected '2 ClassName'"):
        find_videos(root)
    (root / "ucfTrainTestlist/classInd.txt").write_text("1 RedDisc\n")
    with pytest.raises(ValueError, match="class folder 'CyanDiamond' is not in"):
        find_videos(root)


@pytest.mark.parametrize("per_rank", [1, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_every_epoch_covers_the_set_once_and_training_resumes(monkeypatch, world, per_rank):
    length, micro, seed = 10, 4, int(torch.seed() % 2**31)
    monkeypatch.setattr(distributed, "world_size", lambda: world)

    def batches(rank, start=0):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        return iter(MicroBatches(length, world * per_rank * micro, micro, seed, start))

    ranks, steps = [batches(rank) for rank in range(world)], 15
    taken = [[[next(rank) for _ in range(per_rank)] for rank in ranks] for _ in range(steps)]
    keys = [key for step in taken for rank in step for batch in rank for key in batch]
    for epoch in range(len(keys) // length):
        chunk = keys[epoch * length : (epoch + 1) * length]
        assert sorted(key.clip for key in chunk) == list(range(length))
        assert {key.epoch for key in chunk} == {epoch}
    assert [key.clip for key in keys[:length]] != [key.clip for key in keys[length : 2 * length]]
    resumed = batches(world - 1, start=9)
    assert [[next(resumed) for _ in range(per_rank)] for _ in range(3)] == [step[-1] for step in taken[9:12]]


def test_an_order_takes_batches_larger_than_the_set():
    keys = ClipOrder(3, 8, 0).keys(0)
    assert [key.epoch for key in keys] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_an_order_names_the_bad_argument():
    for options, match in [
        ({"length": 0}, "length: got 0"),
        ({"batch": 0}, "batch: got 0"),
        ({"seed": -1}, "seed: got -1"),
    ]:
        with pytest.raises(ValueError, match=match):
            ClipOrder(**{"length": 4, "batch": 2, **options})


def test_commands(tmp_path, capsys):
    root = tmp_path / "set"
    assert Synthetic(root, clips=2, frames=6, size=(16, 32), classes=("RedDisc",)).run() == 0
    assert "2 clips of 1 classes" in capsys.readouterr().out
    assert Inspect(root, full=True).run() == 0
    out = capsys.readouterr().out
    assert "6 frames 32x16 16 fps h264, decord" in out
    assert "2 files of 1 classes: 2 read with decord" in out
    assert Inspect(root, frames=4, stride=2).run() == 1
    assert "would be skipped: got 6 frames, expected >= 7 (frames=4, stride=2)" in capsys.readouterr().out
    (root / "RedDisc" / "bad.mp4").write_text("no video")
    assert Inspect(root).run() == 1
    assert "1 skipped" in capsys.readouterr().out
    assert Inspect(root / "RedDisc" / "bad.mp4").run() == 1
    with pytest.raises(ValueError, match="frames: got 0, expected at least 1"):
        Inspect(root, frames=0).run()
