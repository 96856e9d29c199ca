"""``hpdm sample`` with frames of the user: clips to go on from, images at the ends, videos of low resolution."""

from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import avg_pool3d

from hpdm.cli import main
from hpdm.commands.given import GivenOptions
from hpdm.commands.sample import sample
from hpdm.commands.source import Source, probe_source
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import VideoInfo
from hpdm.data.synthetic import render_synthetic
from hpdm.data.windows import Window
from hpdm.video import write_video
from tests.sampling.long_commands import FAST, frames_of, long_run, options, psnr, sampled


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Clips of 16 frames of 32x32; levels of 4x8x8 and 8x16x16 below."""
    return long_run(tmp_path_factory.mktemp("given") / "run")


@pytest.fixture(scope="module")
def slow_run(tmp_path_factory):
    """The same, trained on every second frame at 10 frames per second."""
    return long_run(tmp_path_factory.mktemp("given") / "slow", {"stride": 2, "fps": 10.0})


def moving(frames, height, width):
    """A bright disc that moves over a gradient, uint8 ``[3, F, H, W]``."""
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / width, indexing="ij")
    at = 0.2 + 0.6 * torch.arange(frames)[:, None, None] / frames
    disc = 170 * torch.exp(-((x - at) ** 2 + (y - 0.5) ** 2) * 25)
    return torch.stack([disc + 70 * part for part in (x, y, 1 - x)]).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Writes an image with a bright spot at a place between 0 and 1; returns its path and pixels ``[H, W, 3]``."""

    def write(name, place, size=(32, 32)):
        pixels = moving(100, *size)[:, int(place * 99)].permute(1, 2, 0).numpy()
        path = tmp_path_factory.mktemp("images") / name
        Image.fromarray(pixels).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
        return path, pixels

    return write


def seconds(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.frames / stream.average_rate


def gray(video):
    """With less contrast, so that pixels stay in range whatever detail a random model adds."""
    return video // 3 + 85


def near(got, expected):
    """Equal but for the noise of the codec."""
    return psnr(np.asarray(got), np.asarray(expected)) > 33


CLIPS = {
    "as in training": (20, 32, 32, 16),
    "larger": (24, 90, 120, 16),
    "odd": (13, 51, 37, 16),
    "another rate": (60, 48, 64, 30),
    "23.976": (41, 48, 64, 23.976),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_video_begins_with_the_last_frames_of_a_clip(run, tmp_path, capsys, name):
    count, height, width, fps = CLIPS[name]
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "clip.mp4", moving(count, height, width), fps)
    got = sampled(run, tmp_path / "out", frames=20, continues=tmp_path / "clips" / "clip.mp4")
    assert got.shape == (20, 32, 32, 3)
    # The last 8 frames: two of level 0, of which each stands for four.
    (clip,) = VideoDataset(tmp_path / "clips", frames=count, size=(32, 32))
    expected = clip["video"][:, -8:].permute(1, 2, 3, 0).numpy()
    assert near(got[:8], expected)
    assert not near(got[8:16], expected)
    said = capsys.readouterr().out
    assert f"clip.mp4: {count} frame(s) of {height}x{width}, read as in training: resized and cropped to 32x32;" in said
    assert "the last 8 frames of these are the first of every video" in said


def test_a_clip_is_read_at_the_rate_of_the_run(slow_run, tmp_path, capsys):
    """Every second frame at 10 frames per second is one in 0.2 s: the last of a clip at 25 are 5 frames apart."""
    video = moving(60, 48, 64)
    write_video(tmp_path / "clip.mp4", video, 25)
    got = sampled(slow_run, tmp_path / "out", frames=12, continues=tmp_path / "clip.mp4", known=1)
    expected = frames_of(tmp_path / "clip.mp4")[44::5]
    small = [Image.fromarray(frame).crop((8, 0, 56, 48)).resize((32, 32)) for frame in expected]
    assert near(got[:4], np.stack(small))
    assert "cropped to 32x32 at 10 frames per second, one frame in 2; the last 4 frames" in capsys.readouterr().out
    write_video(tmp_path / "fast.mp4", video, 100)
    with pytest.raises(ValueError, match=r"got 60 frames, expected >= 221 \(frames=12, stride=2, fps=10 of 100\)$"):
        sample(options(slow_run, tmp_path / "out", continues=tmp_path / "fast.mp4", known=3))


def test_rendered_clips_go_on(run, tmp_path):
    render_synthetic(tmp_path / "clips", clips=2, frames=20, size=(64, 64), classes=["RedDisc"])
    clips = VideoDataset(tmp_path / "clips", frames=20, size=(32, 32))
    paths = sample(options(run, tmp_path / "out", continues=Path(clips.files[1].path), frames=20, known=3, count=2))
    for out in paths:
        assert near(frames_of(out)[:12], clips[1]["video"][:, -12:].permute(1, 2, 3, 0))
    assert not np.array_equal(frames_of(paths[0])[12:], frames_of(paths[1])[12:])


@pytest.mark.parametrize(("name", "size"), [("a.png", (32, 32)), ("a.JPG", (75, 41)), ("a.webp", (16, 64))])
def test_a_video_begins_with_an_image(run, image, tmp_path, capsys, name, size):
    path, pixels = image(name, 0.3, size)
    got = sampled(run, tmp_path / "out", frames=20, animate=path)
    expected = Source("animate", probe_source("animate", path), (32, 32)).first()[0].permute(1, 2, 3, 0).numpy()
    assert len(got) == 20
    assert near(got[:1], expected)
    if size == (32, 32):
        assert near(got[:1], pixels[None])
    assert f"{name}: 1 frame(s) of {size[0]}x{size[1]}, read as in training: resized and cropped to 32x32\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("frames", [16, 20, 36])
def test_a_video_begins_and_ends_with_images(run, image, tmp_path, frames):
    (first, first_pixels), (last, last_pixels) = image("first.png", 0.1), image("last.png", 0.9)
    got = sampled(run, tmp_path / "out", frames=frames, between=(first, last))
    assert len(got) == frames
    assert near(got[:1], first_pixels[None])
    assert near(got[-1:], last_pixels[None])
    assert not near(got[-1:], first_pixels[None])


def test_images_serve_a_run_with_a_frame_rate(slow_run, image, tmp_path):
    (first, pixels), (last, _) = image("first.png", 0.1), image("last.bmp", 0.9)
    assert near(sampled(slow_run, tmp_path / "animate", animate=first)[:1], pixels[None])
    assert len(sampled(slow_run, tmp_path / "between", between=(first, last))) == 16


def averaged(video, ratio):
    """Means over blocks of ``(frames, rows, columns)``: ``[F, H, W, 3]`` float."""
    blocks = avg_pool3d(torch.from_numpy(video).float().permute(3, 0, 1, 2)[None], ratio)
    return blocks[0].permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("level", [0, 1])
def test_the_levels_that_the_command_writes_are_kept(run, tmp_path, level, capsys):
    """What --save-levels writes comes back, frame for frame, as the averages of the new video."""
    sample(options(run, tmp_path / "pyramid", save_levels=True))
    path = tmp_path / "pyramid" / f"video_seed0_level{level}.mp4"
    given = frames_of(path)
    assert given.shape == ((4, 8, 8, 3), (8, 16, 16, 3))[level]
    assert seconds(path) == seconds(tmp_path / "pyramid" / "video_seed0.mp4")
    capsys.readouterr()
    got = sampled(run, tmp_path / "out", from_level=path, consistency=1.0, seed=7)
    assert got.shape == (16, 32, 32, 3)
    ratio = 4 // 2**level
    assert near(averaged(got, (ratio, ratio, ratio)), given)
    assert f"taken for level {level} frame for frame: each stands for {ratio} frame(s) of the video" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("windows", [1, 3])
def test_a_level_of_any_source_is_kept_in_every_window(run, tmp_path, level, windows):
    ratio = 4 // 2**level
    frames = (16 + 8 * (windows - 1)) // ratio
    write_video(tmp_path / "level.mp4", gray(moving(frames, 8 * 2**level, 8 * 2**level)))
    got = sampled(run, tmp_path / "out", from_level=tmp_path / "level.mp4", consistency=1.0)
    assert got.shape == (frames * ratio, 32, 32, 3)
    averages = averaged(got, (ratio, ratio, ratio))
    truth = frames_of(tmp_path / "level.mp4")
    for frame in range(frames):
        assert near(averages[frame : frame + 1], truth[frame : frame + 1]), frame
        assert psnr(averages[frame], truth[frame]) > psnr(averages[frame], truth[frame - frames // 2])


def test_a_video_of_another_size_is_averaged_down(run, tmp_path, capsys):
    """A clip of 20x26 has the resolution of level 1; its frames are those of the result, and more than two windows."""
    write_video(tmp_path / "clip.mp4", gray(moving(30, 20, 26)))
    got = sampled(run, tmp_path / "out", from_level=tmp_path / "clip.mp4", consistency=1.0)
    assert got.shape == (30, 32, 32, 3)
    info = probe_source("from_level", tmp_path / "clip.mp4")
    level = Source("from_level", info, (16, 16)).part(0, 30)[0].permute(1, 2, 3, 0).numpy()
    assert near(averaged(got, (2, 2, 2)), averaged(level, (2, 1, 1)))
    said = capsys.readouterr().out
    assert (
        "clip.mp4: 30 frame(s) of 20x26, read as in training: resized and cropped to 16x16; taken for level 1" in said
    )


def test_one_window_needs_no_known_frames(run, tmp_path):
    without = long_run(tmp_path / "without", known_frames=False)
    write_video(tmp_path / "level.mp4", gray(moving(4, 8, 8)))
    got = sampled(without, tmp_path / "out", from_level=tmp_path / "level.mp4", consistency=1.0)
    assert near(averaged(got, (4, 4, 4)), frames_of(tmp_path / "level.mp4"))
    write_video(tmp_path / "long.mp4", moving(5, 8, 8))
    with pytest.raises(
        ValueError, match=r"^from_level: got 20 frames, expected at most 16, a clip: the model was trained"
    ):
        sample(options(without, tmp_path / "out", from_level=tmp_path / "long.mp4"))


def test_from_level_goes_on_after_an_interruption(run, tmp_path, monkeypatch):
    from hpdm.commands import unfinished

    write_video(tmp_path / "level.mp4", moving(10, 8, 8))
    command = partial(options, run, from_level=tmp_path / "level.mp4", columns=4)
    (whole,) = sample(command(tmp_path / "whole"))
    real, count = unfinished.write_state, 0

    def write_state(path, state):
        nonlocal count
        count += 1
        real(path, state)
        if count < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(unfinished, "write_state", write_state)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sample(command(tmp_path / "out"))
    (again,) = sample(command(tmp_path / "out"))
    assert again.read_bytes() == whole.read_bytes()


# ---- a source's frames ----


@pytest.mark.parametrize(
    ("stride", "fps"), [(1, None), (3, None), (1, 16.0), (1, 7.3), (2, 23.976), (1, 1000.0), (5, 2500.0)]
)
@pytest.mark.parametrize("times", [False, True])
def test_the_length_is_the_longest_window_that_fits(stride, fps, times):
    for frames in (2, 7, 30) if times else (1, 2, 7, 30):
        at = tuple((np.arange(frames) / 16 + 0.01 * (np.arange(frames) % 2)).tolist()) if times else None
        info = VideoInfo("x.mp4", frames, 8, 8, 16.0, "h264", 1, 0, times=at)
        source = Source("continue", info, (8, 8), stride, fps)
        length = source.length
        assert Window(length, stride, fps).starts(info) > 0
        assert Window(length + 1, stride, fps).starts(info) == 0
        assert source._numbers.min() >= 0
        assert source._numbers.max() < frames
        assert (np.diff(source._numbers) >= 0).all()
    info = VideoInfo("x.mp4", 5, 8, 8, 0.0, "h264", 1, 0)
    with pytest.raises(ValueError, match=r"^continue: got x.mp4 without a frame rate, which the run's fps=8 needs$"):
        Source("continue", info, (8, 8), 1, 8.0)


# ---- bad input: one line that names the option ----


@pytest.fixture(scope="module")
def bad(tmp_path_factory, image):
    """A folder of files that are not what they should be, beside good ones."""
    folder = tmp_path_factory.mktemp("bad")
    good, _ = image("good.png", 0.5)
    (folder / "good.png").write_bytes(good.read_bytes())
    write_video(folder / "good.mp4", moving(20, 32, 32))
    write_video(folder / "short.mp4", moving(7, 32, 32))
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "truncated.png").write_bytes(good.read_bytes()[:60])
    (folder / "truncated.mp4").write_bytes((folder / "good.mp4").read_bytes()[:500])
    (folder / "folder.png").mkdir()
    (folder / "folder.mp4").mkdir()
    (folder / "image.mp4").write_bytes(good.read_bytes())
    write_sound(folder / "sound.mp4")
    return folder


def write_sound(path):
    """Half a second of silence, as an mp4 without a picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


BAD = {
    ("--animate", "text.png"): "animate: {}: not a readable video: ",
    ("--animate", "empty.png"): "animate: {}: not a readable video: ",
    ("--animate", "truncated.png"): "animate: {}: ",
    ("--animate", "folder.png"): "animate: got {}, which is a folder, expected a file",
    ("--animate", "missing.png"): "animate: got {}, which is missing, expected a file",
    ("--animate", "good.mp4"): "animate: got {}, expected an image (.bmp .jpeg .jpg .png .webp)",
    ("--between", "text.png", "good.png"): "between: {}: not a readable video: ",
    ("--between", "good.mp4", "good.png"): "between: got {}, expected an image (.bmp .jpeg .jpg .png .webp)",
    ("--between", "missing.png", "good.png"): "between: got {}, which is missing, expected a file",
    ("--continue", "short.mp4"): "continue: {}: got 7 frames, expected >= 8 (frames=8, stride=1)",
    ("--continue", "good.png"): "continue: got {}, an image, expected a video; --animate takes images",
    ("--continue", "image.mp4"): "continue: {}: got 1 frames, expected >= 8 (frames=8, stride=1)",
    ("--continue", "missing.mp4"): "continue: got {}, which is missing, expected a file",
    ("--continue", "folder.mp4"): "continue: got {}, which is a folder, expected a file",
    ("--continue", "empty.mp4"): "continue: {}: not a readable video: ",
    ("--continue", "truncated.mp4"): "continue: {}: not a readable video: ",
    ("--continue", "sound.mp4"): "continue: {}: not a readable video: ",
    ("--from-level", "good.png"): "from_level: got {}, an image, expected a video; --animate takes images",
    ("--from-level", "missing.mp4"): "from_level: got {}, which is missing, expected a file",
    ("--from-level", "sound.mp4"): "from_level: {}: not a readable video: ",
    ("--continue", "good.mp4", "--frames", "8"): "frames: got 8, expected more than the 8 that are given",
    ("--continue", "good.mp4", "--known", "4"): "known: got 4, expected 1 to 3: a window has 4 frames of level 0",
    ("--continue", "good.mp4", "--known", "0"): "known: got 0, expected at least 1",
    ("--animate", "good.png", "--frames", "1"): "frames: got 1, expected more than the 1 that are given",
    ("--animate", "good.png", "--frames", "-1"): "frames: got -1, expected at least 1",
    ("--from-level", "good.mp4", "--frames", "9"): "frames: got 9 with from_level, expected none: the video is as long",
    ("--continue", "good.mp4", "--animate", "good.png"): "continue: got continue and animate, expected one of them",
    ("--between", "good.png", "good.png", "--frames", "12"): "frames: got 12, expected at least 16, and a multiple of",
    ("--between", "good.png", "good.png", "--frames", "18"): "frames: got 18, expected at least 16, and a multiple of",
}


@pytest.fixture
def failed(run, bad, tmp_path, capsys):
    """Runs the command line with files of the folder ``bad``; returns the one line that it prints of its error."""

    def attempt(*words, run=run):
        words = [bad / word if word.endswith((".png", ".mp4")) else word for word in words]
        words = ["sample", "--run", run, "--out", tmp_path / "out", "--count", 1, *words, *FAST]
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line and "segment/s" not in line]
        assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
        return line

    return attempt


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_named_in_one_line(failed, bad, words):
    expected = BAD[words].format(bad / words[1])
    assert failed(*words).startswith(f"hpdm: error: {expected}")


def test_a_run_without_known_frames_says_what_to_do(failed, bad, tmp_path):
    without = long_run(tmp_path / "without", known_frames=False)
    for words in (("--continue", "good.mp4"), ("--animate", "good.png"), ("--between", "good.png", "good.png")):
        assert failed(*words, run=without) == (
            f"hpdm: error: {words[0][2:]}: got {bad / words[1]}, expected none: the model was trained without known "
            "frames; train it on with --init and --known-frames"
        )


def test_a_run_of_one_level_has_no_lower_ones(failed, bad, tmp_path):
    one = long_run(tmp_path / "one", levels=1, levels_per_block=(1,))
    assert failed("--from-level", "good.mp4", run=one) == (
        f"hpdm: error: from_level: got {bad / 'good.mp4'} for a run of one level, expected one of several"
    )


def test_a_file_that_the_command_would_replace_is_named(run, tmp_path):
    (path,) = sample(options(run, tmp_path, frames=10))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^continue: got .*video_seed0.mp4, which this command would replace; choose"):
        sample(options(run, tmp_path, continues=path, frames=20))
    with pytest.raises(ValueError, match=r"^animate: got .*contact_sheet.png, which this command would replace"):
        sample(options(run, tmp_path, animate=tmp_path / "contact_sheet.png"))
    assert path.read_bytes() == before
    (longer,) = sample(options(run, tmp_path, continues=path, frames=20, seed=1))
    assert near(frames_of(longer)[:8], frames_of(path)[-8:])


def test_options_tell_what_is_given(tmp_path):
    given = GivenOptions(frames=9, continues=tmp_path / "a.mp4")
    assert given.files == {"continue": (tmp_path / "a.mp4",)}
    assert (given.names, given.is_long) == ("frames and continue", True)
    assert not GivenOptions().is_long
