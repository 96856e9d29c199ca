"""Images as clips of one frame: which files are taken, what their windows show, captions, labels and shards."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hpdm.commands.data import Inspect, Shard
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import probe, read_clip
from hpdm.data.order import ClipKey
from hpdm.data.suffixes import is_image, is_video
from hpdm.video import write_video


def picture(brightness, size=(16, 16)):
    return Image.new("RGB", (size[1], size[0]), (brightness,) * 3)


@pytest.fixture
def images(tmp_path):
    """A flat folder with an image of each kind, of several sizes."""
    root = tmp_path / "images"
    root.mkdir()
    kinds = [("a.png", 20), ("b.jpg", 60), ("c.JPEG", 100), ("d.webp", 140), ("e.bmp", 180)]
    for (name, brightness), size in zip(kinds, [(16, 16), (24, 40), (10, 64), (17, 33), (8, 8)]):
        picture(brightness, size).save(root / name)
    return root


def brightness(video):
    """Of each frame."""
    return video.float().mean((0, 2, 3)).round().int().tolist()


def test_suffixes_tell_images_from_videos():
    assert all(map(is_image, ("a.png", "B.JPG", "c.jpeg", "d.webp", "e.bmp", "x.mp4/f.png")))
    assert all(map(is_video, ("a.mp4", "B.AVI", "c.gif", "d.webm")))
    assert not any(is_image(name) or is_video(name) for name in ("a.txt", "png", "a.png.txt", "a.mp4/x"))


@pytest.mark.parametrize("cache_bytes", [0, 10**9])
def test_the_window_of_an_image_is_the_image_repeated(images, caplog, cache_bytes):
    """Whatever the options of windows are."""
    for options in ({}, {"stride": 7}, {"fps": 100}, {"short": "error"}, {"short": "loop"}, {"train": False}):
        data = VideoDataset(images, frames=4, size=(8, 12), cache_bytes=cache_bytes, **options)
        assert (len(data), data.class_names) == (5, [])
        for number, expected in enumerate([20, 60, 100, 140, 180]):
            for epoch in range(2):
                item = data[ClipKey(number, epoch)]
                assert (item["video"].shape, item["start"]) == ((3, 4, 8, 12), 0)
                assert brightness(item["video"]) == pytest.approx([expected] * 4, abs=2)
                assert torch.equal(item["video"][:, 0], item["video"][:, 3])
        assert data.short_clips() == {}
    assert "rate" not in caplog.text


def test_pixels_are_those_of_the_file(tmp_path, generator):
    noise = torch.randint(0, 256, (24, 40, 3), generator=generator, dtype=torch.uint8).numpy()
    for name in ("a.png", "b.webp", "c.bmp"):
        Image.fromarray(noise).save(tmp_path / name, **{"lossless": True} if name == "b.webp" else {})
    data = VideoDataset(tmp_path, frames=2, size=(24, 40))
    for number in range(3):
        assert np.array_equal(data[number]["video"].permute(1, 2, 3, 0)[1].numpy(), noise)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_shown_upright(tmp_path, suffix, orientation):
    """EXIF's eight orientations, against Pillow."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16], stored[:8] = stored[:, :16] + 120, stored[:8] + 60
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **{"lossless": True} if suffix == "webp" else {})
    with Image.open(path) as photo:
        upright = np.asarray(ImageOps.exif_transpose(photo).convert("RGB")).astype(int)
    assert (probe(path).height, probe(path).width) == upright.shape[:2]
    assert np.abs(read_clip(path, [0]).frames[0].astype(int) - upright).max() <= 8


def test_names_that_look_like_patterns_are_names(tmp_path):
    """Ffmpeg reads img%03d.png as a sequence of images, and a*.png as all that match."""
    names = ["img%03d.png", "a*.png", "b?.jpg", "c[1].png", "d{1,2}.png", "img001.png"]
    for number, name in enumerate(names):
        picture(40 * number).save(tmp_path / name)
    data = VideoDataset(tmp_path, frames=2, size=16)
    found = {item["path"].rpartition("/")[2]: brightness(item["video"])[0] for item in map(data.__getitem__, range(6))}
    assert found == {name: pytest.approx(40 * number, abs=2) for number, name in enumerate(names)}


def left_out(data):
    return {reason.reason: reason.count for reason in data.found.left_out}


def test_images_beside_videos_are_left_out_and_counted(images, tmp_path):
    assert left_out(VideoDataset(images, frames=4, size=8)) == {}
    write_video(images / "clip.mp4", torch.zeros(3, 4, 16, 16, dtype=torch.uint8))
    data = VideoDataset(images, frames=4, size=8)
    assert [file.path.rpartition("/")[2] for file in data.files] == ["clip.mp4"]
    assert left_out(data) == {"images beside videos": 5}
    # Thumbnails in a folder of their own are no class.
    sorted_set = tmp_path / "sorted"
    for folder in ("Archery", "thumbnails"):
        (sorted_set / folder).mkdir(parents=True)
    write_video(sorted_set / "Archery" / "x.mp4", torch.zeros(3, 4, 16, 16, dtype=torch.uint8))
    picture(9).save(sorted_set / "thumbnails" / "x.jpg")
    assert VideoDataset(sorted_set, frames=4, size=8).class_names == ["Archery"]


def test_images_have_classes_and_captions_as_videos_have(tmp_path):
    for number, name in enumerate(["cat/1.png", "cat/2.jpg", "dog/1.png"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        picture(40 * number).save(path)
        path.with_suffix(".txt").write_text(f"picture {number}")
    data = VideoDataset(tmp_path, frames=2, size=8, captions=True)
    assert (data.class_names, data.labels) == (["cat", "dog"], [0, 0, 1])
    assert [data[number]["caption"] for number in range(3)] == ["picture 0", "picture 1", "picture 2"]
    (tmp_path / "captions.jsonl").write_text('{"file": "dog/1.png", "caption": "a dog"}\n')
    assert VideoDataset(tmp_path, frames=2, size=8, captions=True)[2]["caption"] == "a dog"


def test_a_damaged_image_is_replaced_by_the_next(images, caplog):
    (images / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (images / "d.webp").write_bytes(b"")
    data = VideoDataset(images, frames=2, size=8)
    assert data[1]["path"].endswith("c.JPEG")
    assert "b.jpg" in caplog.text
    assert "frames, expected" not in caplog.text


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def png(brightness):
    data = io.BytesIO()
    picture(brightness).save(data, "png")
    return data.getvalue()


def test_shards_of_images(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, label in ((1, 1), (2, 0)):
            add(tar, f"{number}.png", png(50 * number))
            add(tar, f"{number}.thumb.jpg", b"no image of the key")
            add(tar, f"{number}.json", json.dumps({"label": label, "caption": f"picture {number}"}).encode())
    for _ in range(2):  # the second reads the saved index
        data = VideoDataset(tmp_path, frames=3, size=8, captions=True)
        assert data.labels == [1, 0]
        assert [brightness(data[number]["video"]) for number in range(2)] == [[50] * 3, [100] * 3]
        assert data[1]["caption"] == "picture 2"


def test_images_beside_videos_in_shards_are_left_out(tmp_path):
    write_video(tmp_path / "x.mp4", torch.zeros(3, 4, 16, 16, dtype=torch.uint8))
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        add(tar, "1.mp4", (tmp_path / "x.mp4").read_bytes())
        add(tar, "1.png", png(1))
    with tarfile.open(tmp_path / "shards" / "1.tar", "w") as tar:
        add(tar, "2.png", png(2))
    data = VideoDataset(tmp_path / "shards", frames=2, size=8)
    assert [file.path.rpartition("/")[2] for file in data.files] == ["1.mp4"]
    assert left_out(data) == {"images beside videos": 1}


def test_two_images_of_one_key_are_no_clip(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "1.png", png(1))
        add(tar, "1.jpg", png(2))
    with pytest.raises(ValueError, match=r"0\.tar: no videos in it, .*, or images, one of each key \(\.bmp"):
        VideoDataset(tmp_path, frames=2, size=8)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add(tar, "2.png", png(90))
        for name in ("3.png", "3.jpg"):
            add(tar, name, png(1))
    data = VideoDataset(tmp_path / "1.tar", frames=2, size=8)
    assert (len(data), left_out(data)) == (1, {"members that belong to no video": 2})


def test_packing_and_inspecting_images(images, tmp_path, capsys):
    assert Shard(images, tmp_path / "shards").run() == 0
    data = VideoDataset(tmp_path / "shards", frames=2, size=8)
    assert [brightness(data[number]["video"])[0] for number in (0, 3)] == pytest.approx([20, 140], abs=2)
    assert Inspect(images, frames=64).run() == 0, "an image is never too short"
    assert "5 files" in capsys.readouterr().out


def test_a_set_without_images_and_videos_says_what_it_may_hold(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(ValueError, match=r"no videos in .*expected names ending in \.avi .*, or images alone \(\.bmp "):
        VideoDataset(tmp_path, frames=2, size=8)
