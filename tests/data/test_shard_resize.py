"""Shards of clips encoded anew: the same frames, smaller, at the same times, quick to seek in; damage named."""

import logging
import tarfile
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from hpdm.commands.data import Shard
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import DecodeError, probe, read_clip
from hpdm.data.finding import find_clips
from hpdm.data.reencode import reencode
from hpdm.data.shard_writer import write_shards
from hpdm.data.shards import read_shards


def moving(frames, height, width):
    """A smooth pattern that moves by two pixels a frame, uint8 ``[F, H, W, 3]``."""
    y, x, t = np.ogrid[:height, :width, :frames]
    waves = [np.sin((x + 2 * t) / 11) + np.cos(y / 7), np.sin((y + t) / 9) + 0 * x, np.cos((x - 2 * t) / 17) + 0 * y]
    video = np.stack([128 + 50 * wave for wave in waves], axis=-1)  # [H, W, F, 3]
    return np.ascontiguousarray(video.transpose(2, 0, 1, 3)).round().astype(np.uint8)


def encode(path, video, *, codec="libx264", options=None, ticks=None, aspect=None, rotation=None):
    """Writes a video at 10 frames per second, or with frames at ``ticks`` of a millisecond."""
    base = Fraction(1, 1000) if ticks else Fraction(1, 10)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        stream.options = options or {}
        stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for i, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (ticks[i] if ticks else i), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def by_pillow(frames, height, width):
    """Frames resized by another library: antialiased bilinear, as a float array."""
    images = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in frames]
    return np.stack([np.asarray(image) for image in images]).astype(np.float32)


def psnr(one, other):
    return 10 * np.log10(255**2 / ((one.astype(np.float32) - other) ** 2).mean())


@pytest.fixture
def labeled(tmp_path):
    """Two classes of one clip each, one with a caption."""
    for name, clip in (("Jump", "a.b"), ("Run", "c")):
        (tmp_path / "set" / name).mkdir(parents=True)
        encode(tmp_path / "set" / name / f"{clip}.mp4", moving(20, 96, 128))
    (tmp_path / "set/Jump/a.b.txt").write_text("a jump")
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [((96, 128), 48, (48, 64)), ((128, 72), 36, (64, 36)), ((90, 160), 64, (64, 114)), ((48, 64), 256, (48, 64))],
)
def test_all_frames_at_their_true_size(tmp_path, size, side, expected):
    path = encode(tmp_path / "a.mp4", moving(40, *size), options={"crf": "8", "g": "40"})
    reencode(path, tmp_path / "b.mp4", side)
    info = probe(tmp_path / "b.mp4")
    assert (info.frames, info.height, info.width, info.fps, info.codec) == (40, *expected, 10, "h264")
    assert info.times is None
    whole = read_clip(tmp_path / "b.mp4", range(40)).frames
    original = by_pillow(read_clip(path, range(40)).frames, *expected)
    assert min(psnr(frame, wanted) for frame, wanted in zip(whole, original)) > 32
    # A neighbor is farther away, so no frame is missing or repeated.
    for i in range(39):
        assert psnr(whole[i], original[i]) > psnr(whole[i], original[i + 1]) + 3


def test_a_window_is_never_far_behind_a_keyframe(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(50, 64, 64), options={"g": "250"})
    reencode(path, tmp_path / "b.mp4", 32)
    with av.open(str(tmp_path / "b.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [i for i, packet in enumerate(packets) if packet.is_keyframe] == [0, 16, 32, 48]
    assert [packet.pts for packet in packets] == sorted(packet.pts for packet in packets)
    whole = read_clip(tmp_path / "b.mp4", range(50)).frames
    for start in range(0, 46, 3):
        assert np.array_equal(read_clip(tmp_path / "b.mp4", range(start, start + 4)).frames, whole[start : start + 4])


def test_equal_frames_give_equal_bytes(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(30, 64, 96))
    for name in ("b.mp4", "c.mp4"):
        reencode(path, tmp_path / name, 32)
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


def test_a_long_clip_is_read_in_pieces(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", moving(45, 64, 96))
    reencode(path, tmp_path / "b.mp4", 32)
    lengths = []

    def read(source, numbers, **options):
        lengths.append(len(numbers))
        return read_clip(source, numbers, **options)

    monkeypatch.setattr("hpdm.data.reencode._PIECE_BYTES", 20 * 32 * 48 * 3)
    monkeypatch.setattr("hpdm.data.reencode.read_clip", read)
    reencode(path, tmp_path / "c.mp4", 32)
    assert lengths == [20, 20, 5]
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


def test_frames_keep_their_own_times(tmp_path):
    ticks = [0, 40, 80, 400, 440, 1000, 1033, 1066, 2000, 2040]
    path = encode(tmp_path / "a.mkv", moving(10, 64, 64), ticks=ticks, options={"bf": "0"})
    reencode(path, tmp_path / "b.mp4", 32)
    times = probe(tmp_path / "b.mp4").times
    assert times is not None
    np.testing.assert_allclose(times, np.array(ticks) / 1000, atol=1e-3)


def test_an_odd_rate_is_kept_exactly(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for image in moving(40, 64, 64):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    reencode(tmp_path / "a.mp4", tmp_path / "b.mp4", 32)
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
    assert probe(tmp_path / "b.mp4").times is None


def test_pixels_become_square(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(5, 64, 48), aspect=Fraction(2))
    assert probe(path).pixel_aspect == 2
    reencode(path, tmp_path / "b.mp4", 32)
    info = probe(tmp_path / "b.mp4")
    assert (info.height, info.width, info.pixel_aspect) == (32, 48, 1)
    original = by_pillow(read_clip(path, range(5)).frames, 32, 48)
    assert psnr(read_clip(tmp_path / "b.mp4", range(5)).frames, original) > 32


def test_odd_sizes_become_even(tmp_path):
    path = encode(tmp_path / "a.avi", moving(5, 61, 33), codec="mpeg4", options={"qscale": "2", "flags": "+qscale"})
    reencode(path, tmp_path / "b.mp4", 64)
    info = probe(tmp_path / "b.mp4")
    assert (info.height, info.width) in [(60, 32), (62, 32), (60, 34), (62, 34)]


def test_labels_captions_and_names_are_kept(labeled, tmp_path):
    assert Shard(labeled, tmp_path / "out", resize=32).run() == 0
    data = VideoDataset(tmp_path / "out", frames=4, size=32)
    assert data.class_names == ["Jump", "Run"]
    assert data.labels == [0, 1]
    shards = sorted((tmp_path / "out").glob("*.tar"))
    files = read_shards(shards).files
    assert [file.caption for file in files] == ["a jump", ""]
    with tarfile.open(shards[0]) as tar:
        assert tar.getnames() == ["Jump/a_b.mp4", "Jump/a_b.cls", "Jump/a_b.txt", "Run/c.mp4", "Run/c.cls"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "classes.json", "shard-000000.tar", "shard-000000.tar.index.json",
    ]  # fmt: skip
    plain = VideoDataset(labeled, frames=4, size=(32, 42))
    small = VideoDataset(tmp_path / "out", frames=4, size=(32, 42))
    for i in range(2):
        assert small[i]["start"] == plain[i]["start"]
        assert psnr(small[i]["video"].numpy(), plain[i]["video"].numpy()) > 32


def test_the_same_set_gives_the_same_shards(labeled, tmp_path):
    names, files = find_clips(labeled, captions=True)
    one = write_shards(tmp_path / "one", labeled, names, files, 1, resize=32)
    other = write_shards(tmp_path / "other", labeled, names, files, 1, resize=32)
    assert len(one) == 2
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_damaged_clips_are_left_out_by_name(labeled, tmp_path, caplog, capsys):
    (labeled / "Jump/b.mp4").write_bytes(b"no video")
    encode(labeled / "Jump/c.mp4", moving(8, 64, 64))
    with caplog.at_level(logging.WARNING):
        assert Shard(labeled, tmp_path / "out", resize=32, clips_per_shard=2).run() == 1
    assert f"clip left out: {labeled}/Jump/b.mp4: not a readable video" in caplog.text
    assert "2 shards, 3 clips of 2 classes, 1 with a caption; 1 of 4 clips left out" in capsys.readouterr().out
    assert VideoDataset(tmp_path / "out", frames=4, size=32).labels == [0, 0, 1]


def test_a_set_without_one_good_clip_is_an_error(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"root: none of the 1 clips can be read; the first: .*a\.mp4: not a readable"):
        Shard(tmp_path / "set", tmp_path / "out", resize=32).run()
    assert not (tmp_path / "out").exists()


def test_a_clip_that_is_damaged_inside_is_left_out_whole(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(30, 64, 64), options={"g": "10", "bf": "0"})
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][14]
    data = bytearray(path.read_bytes())
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    path.write_bytes(data)
    with pytest.raises(DecodeError, match=r"a\.mp4"):
        reencode(path, tmp_path / "b.mp4", 32)


@pytest.mark.parametrize("resize", [15, 0, -256])
def test_a_size_too_small_is_refused_before_work_starts(labeled, tmp_path, resize):
    with pytest.raises(ValueError, match=f"resize: got {resize}, expected at least 16"):
        Shard(labeled, tmp_path / "out", resize=resize).run()
    with pytest.raises(ValueError, match=f"side: got {resize}, expected at least 16"):
        reencode(labeled / "Run/c.mp4", tmp_path / "b.mp4", resize)
    assert not (tmp_path / "out").exists()


def test_without_resize_videos_are_packed_as_they_are(labeled, tmp_path):
    assert Shard(labeled, tmp_path / "out").run() == 0
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        assert tar.extractfile("Run/c.mp4").read() == (labeled / "Run/c.mp4").read_bytes()


def test_a_clip_shown_turned_is_stored_upright(tmp_path):
    path = encode(tmp_path / "a.mp4", moving(6, 64, 96), options={"crf": "8"})
    data = path.read_bytes()
    straight = b"".join(n.to_bytes(4, "big", signed=True) for n in (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
    quarter = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
    head, found, rest = data.partition(b"tkhd")
    assert found
    assert straight in rest
    path.write_bytes(head + found + rest.replace(straight, quarter, 1))
    assert (probe(path).height, probe(path).width) == (96, 64)
    reencode(path, tmp_path / "b.mp4", 32)
    assert (probe(tmp_path / "b.mp4").height, probe(tmp_path / "b.mp4").width) == (48, 32)
    turned = np.rot90(moving(6, 64, 96), k=-1, axes=(1, 2))
    assert psnr(read_clip(tmp_path / "b.mp4", range(6)).frames, by_pillow(turned, 48, 32)) > 28
