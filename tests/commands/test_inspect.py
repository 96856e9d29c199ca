"""``hpdm data inspect`` finds what training would not use, and says what only ``--full`` can find."""

import shutil

import av
import pytest
import torch
from tqdm import tqdm

from hpdm.commands import inspect_data
from hpdm.commands.inspect_data import Inspect
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import VideoInfo
from hpdm.data.found import VideoFile
from hpdm.video import write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A clip of 8 frames at 16 frames per second, and one of 20 at 8."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "short.mp4", torch.zeros(3, 8, 32, 32, dtype=torch.uint8), fps=16)
    write_video(folder / "long.mp4", torch.zeros(3, 20, 32, 32, dtype=torch.uint8), fps=8)
    return folder


@pytest.fixture
def folder(videos, tmp_path):
    """Two classes: the first has a good clip and an empty one, the second a short clip, a text and a film strip."""
    root = tmp_path / "set"
    for name in ("A", "B"):
        (root / name).mkdir(parents=True)
    shutil.copy(videos / "long.mp4", root / "A/long.mp4")
    shutil.copy(videos / "short.mp4", root / "B/short.mp4")
    (root / "A/empty.mp4").touch()
    (root / "B/text.mp4").write_text("no video")
    (root / "B/strip.flv").write_text("other")
    return root


def inspect(path, capsys, **options):
    status = Inspect(path, **options).run()
    return status, capsys.readouterr().out.splitlines()


def test_everything_that_training_would_not_use(folder, capsys):
    status, lines = inspect(folder, capsys, frames=9, short="skip")
    assert status == 1
    assert lines[0] == f"{folder}/A/long.mp4  A  20 frames 32x32 8 fps h264, decord"
    assert lines[1] == (
        f"{folder}/B/short.mp4  B  8 frames 32x32 16 fps h264, decord; would be skipped: a window spans 9 frames"
    )
    assert lines[2].startswith(f"{folder}/B/text.mp4  B  would be skipped: not a readable video")
    assert lines[3:] == [
        "3 files of 2 classes: 1 read with decord, 2 skipped",
        "codecs: h264 (2)",
        "frame rates: 8 (1), 16 (1)",
        "problems: shorter than a window (1), not readable (1)",
        "left out, empty files: 1",
        "  A/empty.mp4",
        "left out, files ending in .flv: 1",
        "  B/strip.flv",
        "damage inside of files, and damage that a codec conceals, is found with --full only",
    ]


def test_quiet_prints_only_what_is_wrong(folder, capsys):
    loud, quiet = (inspect(folder, capsys, frames=9, short="skip", quiet=quiet) for quiet in (False, True))
    assert quiet == (1, loud[1][1:])


def test_an_empty_file_alone_is_a_problem(folder, capsys):
    shutil.rmtree(folder / "B")
    status, lines = inspect(folder, capsys, full=True, quiet=True)
    assert (status, lines[0], lines[-2:]) == (
        1, "1 files of 1 classes: 1 read with decord", ["left out, empty files: 1", "  A/empty.mp4"],
    )  # fmt: skip
    (folder / "A/empty.mp4").unlink()
    assert inspect(folder, capsys)[0] == 0


@pytest.mark.filterwarnings("ignore:.*clips differ in frame rate")
@pytest.mark.parametrize("frames", [1, 4, 8, 9, 20, 21])
@pytest.mark.parametrize(("stride", "fps"), [(1, None), (2, None), (1, 4.0), (1, 32.0), (3, 7.5)])
def test_short_clips_are_those_that_training_cannot_use(videos, capsys, frames, stride, fps):
    _, lines = inspect(videos, capsys, frames=frames, stride=stride, fps=fps, short="skip", quiet=True)
    data = VideoDataset(videos, frames=frames, stride=stride, fps=fps, size=8, short="skip")
    unused = [name for i, name in enumerate(("long", "short")) if data._examine(i) is not None]
    assert [line.split("/")[-1].split(".")[0] for line in lines if "a window spans" in line] == unused


@pytest.mark.parametrize(
    ("short", "status", "text"),
    [("error", 1, "would end training: a window spans 9 frames"), ("skip", 1, "would be skipped"), ("loop", 0, "")],
)
def test_what_happens_to_a_short_clip(videos, capsys, short, status, text):
    got, lines = inspect(videos / "short.mp4", capsys, frames=9, short=short)
    assert (got, text in lines[0]) == (status, True)
    assert lines[1] == {"error": "1 files: 1 too short", "skip": "1 files: 1 skipped"}.get(
        short, "1 files: 1 read with decord"
    )


def test_a_clip_without_a_frame_rate_cannot_be_resampled(videos, capsys, monkeypatch):
    rateless = VideoInfo("x", 8, 32, 32, 0.0, "h264", 1, 0)
    monkeypatch.setattr(inspect_data, "probe", lambda source, timeout: rateless)
    status, lines = inspect(videos / "short.mp4", capsys, fps=4.0)
    assert (status, "would be skipped: no frame rate, which --fps needs" in lines[0]) == (1, True)
    assert "frame rates: unknown (1)" in lines
    assert inspect(videos / "short.mp4", capsys)[0] == 0


def test_captions(folder, capsys):
    for path in (folder / "B/text.mp4", folder / "B/strip.flv", folder / "A/empty.mp4"):
        path.unlink()
    (folder / "captions.jsonl").write_text(
        '{"file": "A/long.mp4", "caption": "x"}\n{"file": "typo.mp4", "caption": "y"}\n'
    )
    assert inspect(folder, capsys)[0] == 0
    status, lines = inspect(folder, capsys, captions=True, quiet=True)
    assert status == 1
    assert lines[0].endswith("short.mp4  B  8 frames 32x32 16 fps h264, decord; would be refused by training with"
                             " captions: it has none")  # fmt: skip
    assert lines[-3:-1] == ["left out, lines of captions.jsonl that match no clip: 1", "  captions.jsonl:2 'typo.mp4'"]


def test_damage_between_the_frames_that_are_looked_at_is_found_with_full(tmp_path, capsys, generator):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in torch.randint(0, 256, (40, 64, 64, 3), generator=generator, dtype=torch.uint8).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode(None))
    data = bytearray(path.read_bytes())
    begin, end = data.index(b"mdat"), data.index(b"moov")
    quarter = begin + (end - begin) // 4  # in frame 10; frames 0, 20 and 39 are looked at
    data[quarter : quarter + 1000] = bytes(1000)
    path.write_bytes(data)
    status, lines = inspect(path, capsys)
    assert (status, lines[-1]) == (
        0, "damage inside of files, and damage that a codec conceals, is found with --full only",
    )  # fmt: skip
    status, lines = inspect(path, capsys, full=True)
    assert (status, "would be skipped: damaged" in lines[0], "--full" in lines[-1]) == (1, True, False)


def test_names_do_not_reach_the_terminal_raw(tmp_path, videos, capsys):
    for name in ("a\x1b[31m.mp4", "b\udcff.mp4"):
        shutil.copy(videos / "short.mp4", tmp_path / name)
    (tmp_path / "c\x07.mp4").touch()
    _, lines = inspect(tmp_path, capsys)
    assert lines[0].startswith(f"{tmp_path}/a\\x1b[31m.mp4  8 frames")
    assert lines[1].startswith(f"{tmp_path}/b\\udcff.mp4  8 frames")
    assert "  c\\x07.mp4" in lines


def test_a_bar_shows_progress(videos, capsys, monkeypatch):
    calls = []

    def bar(files, **options):
        calls.append((list(files), options))
        return files

    bar.write = tqdm.write
    monkeypatch.setattr(inspect_data, "tqdm", bar)
    assert Inspect(videos).run() == 0
    ((files, options),) = calls
    assert files == [VideoFile(str(videos / name), 0) for name in ("long.mp4", "short.mp4")]
    assert (options["delay"], options["unit"], options.get("file")) == (1, "file", None)  # None: standard error


@pytest.mark.parametrize("fps", [0.0, -1.0, float("inf"), float("nan")])
def test_a_bad_rate_is_named(tmp_path, fps):
    with pytest.raises(ValueError, match=r"^fps: got .*, expected > 0$"):
        Inspect(tmp_path, fps=fps)
