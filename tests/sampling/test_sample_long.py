"""``hpdm sample`` with videos of any length: files, interruptions at every segment, damage, several processes."""

import gc
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpdm.commands import unfinished
from hpdm.commands.long_files import LongFiles
from hpdm.commands.sample import SampleOptions, sample
from hpdm.data.decode import probe
from hpdm.long_video import LongOptions
from hpdm.video import contact_sheet
from hpdm.video_pieces import PIECE, VideoPieces
from tests.hostile.runner import run as run_command
from tests.processes import run_ranks
from tests.sampling.long_commands import FAST, TWO_LEVELS, contents, frames_of, long_run, options, psnr, sampled
from tests.small import random_model, save_as_run, small_config

N = 80
"""Frames of a long video of the fast run: a piece and a part of one, in 6 windows."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return long_run(tmp_path_factory.mktemp("long") / "run")


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """A run whose clips have 16 frames of 16x16."""
    return long_run(tmp_path_factory.mktemp("fast") / "run", **TWO_LEVELS)


@pytest.fixture(scope="module")
def whole(fast):
    """Two videos of ``N`` frames that nothing disturbed, one at a time."""
    out = fast.parent / "whole"
    sample(options(fast, out, frames=N, known=1, count=2, batch=1))
    return out


@pytest.fixture
def written(monkeypatch):
    """Collects the frames that go into videos, in the order in which they do."""
    real, frames = VideoPieces.add, []

    def add(self, new):
        frames.append(new)
        real(self, new)

    monkeypatch.setattr(VideoPieces, "add", add)
    return frames


def test_the_first_frames_do_not_depend_on_how_many_are_asked_for(run, tmp_path, written):
    videos = {}
    for frames in (100, 40, 17, 16, 5, 1):
        written.clear()
        decoded = sampled(run, tmp_path / str(frames), frames=frames)
        videos[frames] = torch.cat(written, dim=1)
        assert videos[frames].shape == (3, frames, 32, 32)
        assert torch.equal(videos[frames], videos[100][:, :frames])
        assert decoded.shape == (frames, 32, 32, 3)
        assert psnr(decoded, videos[frames].permute(1, 2, 3, 0).numpy()) > 30
        info = probe(tmp_path / str(frames) / "video_seed0.mp4")
        assert (info.fps, info.times) == (16, None)
        assert sorted(contents(tmp_path / str(frames))) == ["contact_sheet.png", "video_seed0.mp4"]
        with Image.open(tmp_path / str(frames) / "contact_sheet.png") as sheet:
            expected = contact_sheet([videos[frames]], scale=4)
            assert sheet.convert("RGB").tobytes() == expected.tobytes()


def test_as_many_frames_as_a_clip_are_the_clip(run, tmp_path):
    """A video of one window is what the command samples without --frames."""
    clip = sampled(run, tmp_path / "clip")
    assert np.array_equal(sampled(run, tmp_path / "long", frames=16), clip)
    sheets = [contents(tmp_path / name)["contact_sheet.png"] for name in ("clip", "long")]
    assert sheets[0] == sheets[1]
    assert not np.array_equal(sampled(run, tmp_path / "other", frames=16, seed=1), clip)


def test_several_videos_are_those_that_are_sampled_alone(fast, whole, tmp_path):
    paths = sample(options(fast, tmp_path / "out", frames=N, known=1, count=2, batch=2))
    assert [path.name for path in paths] == ["video_seed0.mp4", "video_seed1.mp4"]
    for path in paths:
        assert psnr(frames_of(path), frames_of(whole / path.name)) > 45  # a batch changes rounding
    alone = sampled(fast, tmp_path / "alone", frames=N, known=1, seed=1)
    assert np.array_equal(alone, frames_of(whole / "video_seed1.mp4"))
    with Image.open(whole / "contact_sheet.png") as sheet:
        assert sheet.size == (8 * (128 + 2) + 2, 2 * (128 + 2) + 2)


class Interrupted(KeyboardInterrupt):
    """The user's Ctrl-C."""


def stop_at(write: int, after: bool, stop) -> None:
    """Makes this process stop at its n-th write of a state, before or after it is written."""
    real, count = unfinished.write_state, 0

    def write_state(path, state):
        nonlocal count
        count += 1
        if count == write and not after:
            stop()
        real(path, state)
        if count == write:
            stop()

    unfinished.write_state = write_state


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise Interrupted


@pytest.mark.parametrize("scheme", ["autoregressive", "joint", "rolling"])
def test_interrupted_at_every_segment_it_goes_on_to_the_same_files(fast, whole, tmp_path, monkeypatch, capsys, scheme):
    out, real, segments = tmp_path / "out", unfinished.write_state, 6
    command = options(fast, out, frames=N, known=1, count=2, batch=1, scheme=scheme)
    if scheme != "autoregressive":
        whole = tmp_path / "whole"
        sample(replace(command, out=whole))
        capsys.readouterr()
    # Before a state is written the segment is lost, after it is not: two interruptions a segment.
    for number in range(segments):
        for after in (False, True):
            monkeypatch.setattr(unfinished, "write_state", real)
            stop_at(1, after, interrupt)
            with pytest.raises(Interrupted):
                sample(command)
            lines = capsys.readouterr().out.splitlines()
            found = [line for line in lines if line.startswith("found")]
            assert found == (
                [f"found {number} finished segment(s) of seeds 0 to 0, going on from there"] * (number > 0)
            )
            (place,) = [line for line in lines if line.startswith("seeds 0 to 0: until all is done")]
            folder = Path(
                place.removeprefix("seeds 0 to 0: until all is done, the frames so far are in ").split(", as")[0]
            )
            assert folder.parent == out / unfinished.FOLDER
            playable = sorted(folder.rglob("*.mp4"))
            assert len(playable) == min(N, 16 + 14 * number) // PIECE
            assert all(probe(path).frames == PIECE for path in playable)
            assert not (out / "video_seed0.mp4").exists()
    # All segments of the first video are finished; nothing is sampled again.
    monkeypatch.setattr(unfinished, "write_state", real)
    sample(command)
    assert contents(out) == contents(whole)
    assert not (out / unfinished.FOLDER).exists()


def test_killed_at_every_segment_it_goes_on_to_the_same_files(fast, whole, tmp_path):
    words = ["sample", "--run", fast, "--out", tmp_path / "out", "--count", 1, "--frames", N, "--known", 1, *FAST]
    killed = 0
    while killed < 20:
        # One segment on; of the next one the pieces are written, and the state is not.
        ended = run_command(words, tmp_path, partial(stop_at, 2, False, kill))
        if ended.status is not None:
            break
        killed += 1
        assert not (tmp_path / "out" / "video_seed0.mp4").exists()
    assert (ended.status, ended.error_lines) == (0, []), ended
    assert killed == 5
    assert sorted(contents(tmp_path / "out")) == ["contact_sheet.png", "video_seed0.mp4"]
    assert contents(tmp_path / "out")["video_seed0.mp4"] == contents(whole)["video_seed0.mp4"]
    assert not (tmp_path / "out" / unfinished.FOLDER).exists()


def test_two_processes_go_on_where_one_stopped(fast, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(unfinished, "write_state", unfinished.write_state)
    stop_at(3, True, interrupt)
    with pytest.raises(Interrupted):
        sample(options(fast, out, frames=N, known=1, count=2, batch=1))
    words = ["sample", "--run", fast, "--out", out, "--count", 2, "--batch", 1, "--frames", N, "--known", 1]
    first, second = run_ranks(["-m", "hpdm", *words, *FAST], 2, TRITON_INTERPRET="0")
    assert "found 3 finished segment(s) of seeds 0 to 0" in first
    assert second == ""
    assert contents(out) == contents(whole)
    assert not (out / unfinished.FOLDER).exists()


def no_room(folder: str, after: int) -> None:
    """Makes the disk full for pieces and for whole videos, once so many of them are written."""
    import errno

    from hpdm import video_pieces

    real_video, real_join, count = video_pieces.write_video, video_pieces.join, 0

    def counted(real):
        def write(*arguments, **options):
            nonlocal count
            count += 1
            if count > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)
            return real(*arguments, **options)

        return write

    video_pieces.write_video, video_pieces.join = counted(real_video), counted(real_join)


def test_a_full_disk_says_where_the_frames_are_and_the_same_command_goes_on(fast, tmp_path):
    words = ["sample", "--run", fast, "--out", tmp_path / "out", "--count", 1, "--frames", 140, "--known", 1, *FAST]
    whole = run_command([*words[:4], tmp_path / "whole", *words[5:]], tmp_path)
    assert whole.status == 0
    for written in range(4):  # two pieces, the rest, the whole
        ended = run_command(words, tmp_path, partial(no_room, str(tmp_path / "out"), written))
        if written == 3:
            break
        assert ended.status == 1
        (line,) = ended.error_lines
        assert line.startswith("hpdm: error: [Errno 28] No space left on device")
        assert line.endswith("the same command goes on from where this one stopped")
        paths = sorted((tmp_path / "out").rglob("*.mp4"))
        if written == 0:
            assert "frames are in" not in line
        else:
            assert f"the first {64 * min(written, 2)} of 140 frames are in {paths[0].parent.parent}, as mp4" in line
        assert [probe(path).frames for path in paths][: min(written, 2)] == [64] * min(written, 2)
        shutil.rmtree(tmp_path / "out") if written < 2 else None
    ended = run_command(words, tmp_path)
    assert ended.status == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def interrupted_at(command: SampleOptions, write: int, monkeypatch: pytest.MonkeyPatch):
    """What an interrupted command leaves: the file of its state, and the folder of its pieces."""
    real = unfinished.write_state
    monkeypatch.setattr(unfinished, "write_state", real)
    stop_at(write, True, interrupt)
    with pytest.raises(Interrupted):
        sample(command)
    monkeypatch.setattr(unfinished, "write_state", real)
    (state,) = (command.out / unfinished.FOLDER).glob("*.safetensors")
    return state, state.with_suffix("") / "000"


def test_what_is_damaged_or_missing_is_named(fast, whole, tmp_path, monkeypatch):
    command = options(fast, tmp_path / "out", frames=N, known=1, count=2, batch=1)
    state, pieces = interrupted_at(command, 5, monkeypatch)
    good = state.read_bytes()
    say = "^out: the finished part of an interrupted run is damaged, delete it: "
    for bad, message in (
        (b"", "damaged"),
        (good[: len(good) // 2], "damaged"),
        (good[:-5] + bytes([good[-5] ^ 1]) + good[-4:], "its hash do not match"),
    ):
        state.write_bytes(bad)
        with pytest.raises(ValueError, match=f"{say}{state}.*{message}"):
            sample(command)
    unfinished.write_state(state, {"0": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"{say}{state}: got \['0'\] too many, and lacks \['frames', 'rest_0', 'seg"):
        sample(command)
    state.write_bytes(good)
    piece = pieces / "000000.mp4"
    kept = piece.read_bytes()
    piece.write_bytes(kept[:2000])
    with pytest.raises(ValueError, match=f"{say}{state}: .*{piece}"):
        sample(command)
    piece.unlink()
    with pytest.raises(ValueError, match=f"{say}{state}: folder: got no {piece}, expected frames 0 to 63 there$"):
        sample(command)
    # What the message says helps: without the state everything is sampled anew.
    state.unlink()
    assert [path.name for path in sample(command)] == ["video_seed0.mp4", "video_seed1.mp4"]
    assert contents(command.out) == contents(whole)


def test_what_was_kept_of_another_command_is_not_used(fast, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted_at(options(fast, out, frames=20, known=1), 1, monkeypatch)
    for number, changes in enumerate(({"known": 2}, {"frames": 26}, {"fps": 8.0}, {"columns": 3})):
        values = {"frames": 20, "known": 1} | changes
        sample(options(fast, out, **values))
        sample(options(fast, tmp_path / str(number), **values))
        fresh = contents(tmp_path / str(number))
        assert {name: hashed for name, hashed in contents(out).items() if "/" not in name} == fresh
        assert len(list((out / unfinished.FOLDER).glob("*.safetensors"))) == 1  # still of the first command


def test_memory_does_not_grow_with_the_length(fast, tmp_path, monkeypatch):
    real, sizes, files = LongFiles.keep, [], []

    def keep(self, segment):
        real(self, segment)
        if segment.number not in (2, 3, 4, 9, 10, 11):
            return
        gc.collect()
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor
        }
        sizes.append(sum(storages.values()))
        files.append(self.path.stat().st_size)

    monkeypatch.setattr(LongFiles, "keep", keep)
    sample(options(fast, tmp_path / "out", frames=2 * PIECE + 40, known=1))
    rest = PIECE * 3 * 16 * 16  # frames since the last piece
    assert len(sizes) == 6
    assert max(sizes[3:]) <= max(sizes[:3]) + rest
    assert max(files[3:]) <= max(files[:3]) + rest
    assert max(files) - min(files) <= rest + 8 * 3 * 16 * 16 + 2000


def test_real_clips_of_another_length_go_above(run, clips, tmp_path):
    command = options(run, tmp_path / "out", frames=40, columns=5, real=clips, count=2)
    sample(command)
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.size == (5 * (128 + 2) + 2, 4 * (128 + 14 + 2) + 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 0}, "frames: got 0, expected at least 1"),
        ({"frames": -3}, "frames: got -3, expected at least 1"),
        ({"frames": 20, "save_levels": True}, "save_levels: got true with frames, expected false"),
        ({"frames": 20, "compare_overlap": True}, "compare_overlap: got true with frames, expected false"),
        ({"known": 1}, "known: got 1 for videos of a clip's length, expected it with --frames"),
        ({"scheme": "joint"}, "scheme: got joint for videos of a clip's length, expected it with --frames"),
        ({"together": 3}, "together: got 3 for videos of a clip's length, expected it with --frames"),
        ({"frames": 20, "known": 0}, "known: got 0, expected at least 1"),
        ({"frames": 20, "fps": 0.0}, "fps: got 0.0, expected > 0"),
        ({"frames": 20, "fps": float("nan")}, "fps: got nan, expected > 0"),
        ({"frames": 20, "columns": 0}, "columns: got 0, expected at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_named(run, tmp_path, values, message):
    with pytest.raises(ValueError) as error:
        options(run, tmp_path / "out", **values)
    assert str(error.value) == message


def test_lengths_that_a_run_cannot_sample_are_named(run, tmp_path):
    with pytest.raises(ValueError, match=r"^known: got 4, expected 1 to 3: a window has 4 frames of level 0"):
        sample(options(run, tmp_path / "out", frames=20, known=4))
    without = long_run(tmp_path / "without", known_frames=False)
    with pytest.raises(
        ValueError,
        match=r"^frames: got 17 frames, expected at most 16, a clip: the model was trained without known frames; train "
        r"it on with --init and --known-frames$",
    ):
        sample(options(without, tmp_path / "out", frames=17))
    assert not (tmp_path / "out").exists()
    assert sampled(without, tmp_path / "short", frames=7).shape == (7, 32, 32, 3)


def test_labels_name_the_videos_and_their_rows(tmp_path):
    config = small_config(tokenizer=(1, 2, 2), known_frames=True, classes=2, **TWO_LEVELS)
    run = save_as_run(random_model(config, "auto", scale=0.05), tmp_path / "run", ["Disc", "Ring"], {"stride": 1})
    paths = sample(options(run, tmp_path / "out", frames=20, classes=("Ring", "Disc"), count=3, batch=2))
    assert [path.name for path in paths] == ["Ring_seed0.mp4", "Disc_seed1.mp4", "Ring_seed2.mp4"]
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.height == 3 * (128 + 14 + 2) + 2


def test_the_default_options_of_windows_are_not_given():
    assert LongOptions() == SampleOptions(run_folder=None, out=None).long
