"""``hpdm data inspect`` finds what training would not use, and says what only ``--full`` can find."""

import shutil

import numpy as np
import pytest
import torch
from tqdm import tqdm

from hpdm.commands import inspect_data
from hpdm.commands.inspect_data import Inspect
from hpdm.data.clips import VideoDataset
from hpdm.data.decode import DecodedClip, DecodeError, StalledError, VideoInfo
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
        f"{folder}/B/short.mp4  B  8 frames 32x32 16 fps h264, decord; would be skipped: got 8 frames, "
        "expected >= 9 (frames=9, stride=1)"
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
        "damage that a codec conceals is found with --full only",
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


@pytest.mark.parametrize("frames", [1, 4, 8, 9, 20, 21])
@pytest.mark.parametrize(("stride", "fps"), [(1, None), (2, None), (1, 4.0), (1, 32.0), (3, 7.5)])
def test_short_clips_are_those_that_training_cannot_use(videos, capsys, frames, stride, fps):
    _, lines = inspect(videos, capsys, frames=frames, stride=stride, fps=fps, short="skip", quiet=True)
    data = VideoDataset(videos, frames=frames, stride=stride, fps=fps, size=8, short="skip")

    def is_used(number, name):
        try:
            return data[number]["path"].endswith(f"{name}.mp4")
        except DecodeError:
            return False  # neither clip can be used

    unused = [name for number, name in enumerate(("long", "short")) if not is_used(number, name)]
    assert [line.split("/")[-1].split(".")[0] for line in lines if "would be skipped: got" in line] == unused


@pytest.mark.parametrize(
    ("short", "status", "text"),
    [
        ("error", 1, "would end training: got 8 frames, expected >= 9 (frames=9, stride=1)"),
        ("skip", 1, "would be skipped"),
        ("loop", 0, ""),
    ],
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


def test_why_decord_does_not_read_a_file(videos, capsys, monkeypatch):
    info = VideoInfo("x", 8, 32, 24, 11.2, "vp9", 1, 0, pixel_aspect=1.5, times=tuple(i / 10 for i in range(8)))
    frames = np.zeros((3, 32, 24, 3), np.uint8)
    monkeypatch.setattr(inspect_data, "probe", lambda source, timeout: info)
    monkeypatch.setattr(inspect_data, "read_clip", lambda *_, **__: DecodedClip(frames, "pyav", "vp9 in webm"))
    status, lines = inspect(videos / "short.mp4", capsys)
    assert (status, lines) == (
        0,
        [
            f"{videos}/short.mp4  8 frames 24x32 (pixels 1.5 times as wide as high) 11.2 fps on average vp9, pyav, not "
            "decord for vp9 in webm",
            "1 files: 1 read with pyav",
            "codecs: vp9 (1)",
            "frame rates: 11.2 (1)",
            "not read with decord for: vp9 in webm (1)",
            "damage that a codec conceals is found with --full only",
        ],
    )


def test_a_file_that_does_not_answer_ends_training(videos, capsys, monkeypatch):
    def probe(source, timeout):
        raise StalledError(f"{source}: no answer")

    monkeypatch.setattr(inspect_data, "probe", probe)
    status, lines = inspect(videos / "short.mp4", capsys)
    assert (status, lines[:2]) == (1, [f"{videos}/short.mp4  would end training: no answer", "1 files: 1 stalled"])


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


def test_damage_inside_of_a_file_is_found_with_full(videos, capsys, monkeypatch):
    path, verified = videos / "long.mp4", []

    def verify(source, timeout):
        verified.append(source)
        raise DecodeError(f"{path}: damaged: frame 5 of 20 is damaged")

    monkeypatch.setattr(inspect_data, "verify", verify)
    status, lines = inspect(path, capsys)
    assert (status, verified) == (0, [])
    assert lines[-1] == "damage that a codec conceals is found with --full only"
    status, lines = inspect(path, capsys, full=True)
    assert (status, verified) == (1, [str(path)])
    assert lines == [
        f"{path}  would be skipped: damaged: frame 5 of 20 is damaged", "1 files: 1 skipped", "problems: damaged (1)",
    ]  # fmt: skip


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
