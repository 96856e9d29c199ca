"""Videos written in pieces: the joined file is that of one pass, however the frames came and wherever it stopped."""

import hashlib
import json
import shutil
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch

from hpdm.video import write_video
from hpdm.video_pieces import PIECE, VideoPieces, join
from tests.disks import small_disk


def clip(frames, height=24, width=32, seed=0):
    """A disc that moves over a gradient, uint8 ``[3, F, H, W]``: no two frames are equal."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.arange(frames)[:, None, None]
    disc = torch.exp(-((x - (5 + seed + 0.7 * at) % width) ** 2 + (y - (5 + 0.3 * at) % height) ** 2) / 20)
    gradient = (x / width + y / height) / 2
    return torch.stack([(disc * 150 + gradient * 90 + shade).clamp(0, 255) for shade in (0, 5, 10)]).to(torch.uint8)


def write(folder, frames, fps=16.0, chunks=None):
    """Writes ``folder.mp4`` in pieces, whose folder is ``folder``."""
    pieces = VideoPieces(folder, fps)
    for chunk in frames.split(chunks or frames.shape[1], dim=1):
        pieces.add(chunk)
    pieces.finish(folder.with_suffix(".mp4"))
    return folder.with_suffix(".mp4")


def ask(program, *arguments):
    """What a program prints; it must have nothing to complain about."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([program, "-v", "warning", *arguments], capture_output=True, check=True)
    assert done.stderr == b""
    return done.stdout


def decode(path, height, width):
    """All frames that ``ffmpeg`` decodes, uint8 ``[F, H, W, 3]``."""
    done = ask("ffmpeg", "-i", path, "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(done, np.uint8).reshape(-1, height, width, 3)


def about(path):
    """What ``ffprobe`` tells of the video stream and its packets."""
    entries = "stream=nb_frames,avg_frame_rate,r_frame_rate,duration,start_time,time_base:packet=pts,dts,flags"
    return json.loads(ask("ffprobe", "-show_entries", entries, "-of", "json", path))


def psnr(a, b):
    """Of each frame, ``[F, H, W, 3]``, in dB."""
    error = ((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-9))


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("frames", "size", "fps"),
    [
        (1, (24, 32), 23.976),
        (PIECE, (24, 32), 16.0),
        (PIECE + 1, (24, 32), 16.0),
        (PIECE + 1, (24, 32), 7.5),
        (PIECE + 1, (23, 33), 23.976),
        (PIECE + 2, (23, 32), 16.0),
        (2 * PIECE + 7, (24, 33), 7.5),
        (2 * PIECE + 2, (24, 32), 23.976),
    ],
)
def test_the_joined_file_is_that_of_one_pass(tmp_path, frames, size, fps):
    video = clip(frames, *size)
    joined = write(tmp_path / "pieces", video, fps)
    write_video(tmp_path / "whole.mp4", video, fps)
    got, whole = decode(joined, *size), decode(tmp_path / "whole.mp4", *size)
    truth = video.permute(1, 2, 3, 0).numpy()
    assert got.shape == truth.shape
    # As near to what was written as one pass is, and each frame nearer to its own than to its neighbor.
    assert psnr(got, truth).min() > max(30, psnr(whole, truth).min() - 1.5)
    assert psnr(got, whole).min() > 30
    assert (psnr(got, truth)[1:] > psnr(got[1:], truth[:-1])).all()
    one_pass, in_pieces = about(tmp_path / "whole.mp4"), about(joined)
    assert in_pieces["streams"] == one_pass["streams"]
    (stream,) = in_pieces["streams"]
    rate = Fraction(fps).limit_denominator(100_000)
    assert Fraction(stream["avg_frame_rate"]) == rate
    assert float(stream["duration"]) == pytest.approx(float(frames / rate), abs=1e-3)  # edits are in milliseconds
    assert stream["start_time"] == "0.000000"
    pts, dts = ([packet[name] for packet in in_pieces["packets"]] for name in ("pts", "dts"))
    step = 1 / rate / Fraction(stream["time_base"])
    assert sorted(pts) == [number * step for number in range(frames)]
    assert dts == [dts[0] + number * step for number in range(frames)]
    assert all(shown >= decoded for shown, decoded in zip(pts, dts))
    # Each piece can be entered.
    assert set(range(0, frames, PIECE)) <= {p["pts"] // step for p in in_pieces["packets"] if "K" in p["flags"]}


def test_every_decoder_gives_the_same_frames(tmp_path):
    import av
    import decord

    video = clip(2 * PIECE + 2)
    path = write(tmp_path / "pieces", video)
    with av.open(str(path)) as container:
        with_av = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    reader = decord.VideoReader(str(path))
    with_decord = reader.get_batch(list(range(len(reader)))).asnumpy()
    assert reader.get_avg_fps() == 16
    for decoded in (with_av, with_decord):
        assert decoded.shape == (2 * PIECE + 2, 24, 32, 3)
        assert psnr(decoded, decode(path, 24, 32)).min() > 40
    backwards = np.stack([reader[n].asnumpy() for n in (PIECE + 1, PIECE, PIECE - 1, 0)])
    assert np.array_equal(backwards, with_decord[[PIECE + 1, PIECE, PIECE - 1, 0]])


def test_our_own_reader_takes_it_for_evenly_spaced(tmp_path):
    from hpdm.data.decode import probe, read_clip, verify

    path = write(tmp_path / "pieces", clip(PIECE + 1), 7.5)
    info = probe(path)
    assert (info.frames, info.fps, info.times, info.damage) == (PIECE + 1, 7.5, None, "")
    verify(path)
    assert read_clip(path, [PIECE, 0, PIECE - 1]).frames.shape == (3, 24, 32, 3)


def test_the_file_does_not_depend_on_how_the_frames_arrived(tmp_path):
    video = clip(2 * PIECE + 5)
    whole = sha(write(tmp_path / "whole", video))
    for chunks in (1, 8, 63, PIECE, PIECE + 1):
        assert sha(write(tmp_path / str(chunks), video, chunks=chunks)) == whole
    assert sha(write(tmp_path / "other", clip(2 * PIECE + 5, seed=1))) != whole


@pytest.mark.parametrize("done", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 5])
def test_the_file_does_not_depend_on_where_it_was_interrupted(tmp_path, done):
    video = clip(2 * PIECE + 5)
    whole = write(tmp_path / "whole", video)
    before = VideoPieces(tmp_path / "again", 16.0)
    if done:
        before.add(video[:, :done])
    rest = before.rest.clone() if done else None
    before.add(video[:, done : done + 70])  # lost, but for whole pieces that it wrote
    after = VideoPieces(tmp_path / "again", 16.0, done, rest)
    after.add(video[:, done:]) if done < video.shape[1] else None
    assert after.in_files == video.shape[1] // PIECE * PIECE
    after.finish(tmp_path / "again.mp4")
    after.finish(tmp_path / "again.mp4")  # as after an interruption while it was joined
    assert sha(tmp_path / "again.mp4") == sha(whole)
    assert [sha(path) for path in sorted((tmp_path / "again").iterdir())] == [
        sha(path) for path in sorted((tmp_path / "whole").iterdir())
    ]


def test_each_piece_plays_by_itself(tmp_path):
    video = clip(2 * PIECE + 5)
    write(tmp_path / "pieces", video)
    paths = sorted((tmp_path / "pieces").iterdir())
    assert [path.name for path in paths] == ["000000.mp4", "000001.mp4", "000002.mp4"]
    truth = video.permute(1, 2, 3, 0).numpy()
    for number, path in enumerate(paths):
        expected = truth[number * PIECE : (number + 1) * PIECE]
        assert psnr(decode(path, 24, 32), expected).min() > 35
        assert about(path)["streams"][0]["start_time"] == "0.000000"


def test_one_piece_at_most_is_in_memory(tmp_path):
    pieces = VideoPieces(tmp_path / "pieces", 16.0)
    for chunk in clip(3 * PIECE + 9).split(40, dim=1):
        pieces.add(chunk)
        assert pieces.rest.shape[1] < PIECE
        assert pieces.rest.untyped_storage().nbytes() == pieces.rest.numel()  # no view of more


def test_what_is_missing_or_damaged_is_named(tmp_path):
    video = clip(2 * PIECE + 1)
    folder = tmp_path / "pieces"
    write(folder, video)
    rest = video[:, 2 * PIECE :]
    with pytest.raises(ValueError, match=r"^rest: got 1 frames, expected 2 of 130$"):
        VideoPieces(folder, 16.0, 2 * PIECE + 2, rest)
    with pytest.raises(ValueError, match=r"^frames: got none, expected at least one$"):
        VideoPieces(tmp_path / "empty", 16.0).finish(tmp_path / "empty.mp4")
    write_video(folder / "000001.mp4", video[:, :3])
    with pytest.raises(ValueError, match=r"^pieces: got 3 frames in .*000001.mp4, expected 64$"):
        VideoPieces(folder, 16.0, 2 * PIECE + 1, rest).finish(tmp_path / "out.mp4")
    (folder / "000001.mp4").write_bytes((folder / "000000.mp4").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"000001.mp4"):
        VideoPieces(folder, 16.0, 2 * PIECE + 1, rest).finish(tmp_path / "out.mp4")
    (folder / "000001.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"^folder: got no .*000001.mp4, expected frames 64 to 127 there$"):
        VideoPieces(folder, 16.0, 2 * PIECE + 1, rest)
    assert not (tmp_path / "out.mp4").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pieces_of_any_length_join(tmp_path):
    """Scene cuts at the end and pieces that are shorter than the encoder's look-ahead."""
    lengths, paths = (1, 2, 3, 64, 1), []
    video = clip(sum(lengths))
    video[:, 70:] = 255 - video[:, 70:]
    for number, part in enumerate(video.split(lengths, dim=1)):
        paths.append((tmp_path / f"{number}.mp4", part.shape[1]))
        write_video(paths[-1][0], part)
    with pytest.raises(ValueError, match="expected 9"):
        join([(paths[0][0], 9)], tmp_path / "short.mp4")
    join(paths[3:], tmp_path / "joined.mp4")
    got = decode(tmp_path / "joined.mp4", 24, 32)
    assert psnr(got, video[:, 6:].permute(1, 2, 3, 0).numpy()).min() > 30


def test_a_full_disk_leaves_whole_pieces_and_the_file_comes_out_the_same(tmp_path):
    video = (torch.rand(3, 3 * PIECE + 9, 64, 64) * 255).to(torch.uint8)  # noise takes room
    whole = write(tmp_path / "whole", video)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "whole").iterdir())]
    with small_disk(tmp_path / "disk", 8) as disk:
        folder = disk / "pieces"
        pieces = VideoPieces(folder, 16.0)

        def leave(room):
            (disk / "fill").write_bytes(bytes((8 << 20) - int(room)))

        leave(1.5 * sizes[0])
        pieces.add(video[:, : PIECE + 5])
        with pytest.raises(OSError, match=r"No space left on device.*000001.mp4"):
            pieces.add(video[:, PIECE + 5 :])
        assert [sha(path) for path in folder.iterdir()] == [sha(tmp_path / "whole" / "000000.mp4")]
        assert (pieces.done, pieces.rest.shape[1]) == (PIECE + 5, 5)
        (disk / "fill").unlink()
        leave(1.3 * sum(sizes))  # enough for the pieces, but not for them and the whole
        pieces.add(video[:, PIECE + 5 :])
        with pytest.raises(OSError, match=r"No space left on device.*video.mp4"):
            pieces.finish(disk / "video.mp4")
        assert sorted(path.name for path in disk.iterdir()) == ["fill", "pieces"]
        assert [sha(path) for path in sorted(folder.iterdir())] == [
            sha(path) for path in sorted((tmp_path / "whole").iterdir())
        ]
        (disk / "fill").unlink()
        pieces.finish(disk / "video.mp4")
        assert sha(disk / "video.mp4") == sha(whole)
