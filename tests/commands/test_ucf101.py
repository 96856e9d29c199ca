"""docs/data.md is walked through with a small copy of UCF-101: its folders, names and lists, MPEG-4, short clips."""

import json
import re
import shlex
from pathlib import Path

import av
import numpy as np
import pytest
import tyro

from hpdm import cli, runs
from hpdm.data.clips import VideoDataset
from hpdm.training.options import TrainOptions

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
# As in the official copies: the folder and the clips of one class are spelled in two ways.
CLASSES = {"ApplyEyeMakeup": "ApplyEyeMakeup", "Archery": "Archery", "HandstandPushups": "HandStandPushups"}
SHORT = "HandstandPushups/v_HandStandPushups_g02_c01.avi"


def commands():
    """The commands of the page that start with hpdm or torchrun, as lists of words after hpdm."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(("hpdm ", "torchrun "))]
    return [[word for word in line[line.index("hpdm") + 1 :] if word != "..."] for line in words]


def on_the_page(*words):
    """The only command of the page that begins with these words."""
    (command,) = [command for command in commands() if command[: len(words)] == list(words)]
    return command


def with_options(command, **changes):
    """The command with other values of some options."""
    changed = list(command)
    for name, value in changes.items():
        option = f"--{name.replace('_', '-')}"
        if option not in changed:
            changed += [option, ""]
        changed[changed.index(option) + 1] = str(value)
    return changed


def hpdm(words):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code


def write_avi(path, frames, brightness):
    """Moving noise with B-frames at 25 frames per second, marked as XviD."""
    generator = np.random.default_rng(brightness)
    picture = generator.integers(0, brightness, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"bf": "2", "g": "12", "qscale": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.codec_tag = "XVID"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, number, axis=1), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """What the two archives hold: groups 1 and 2 for training, 3 for the test, and one clip of twelve frames."""
    root = tmp_path_factory.mktemp("ucf")
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    train, test = [], []
    for label, (folder, stem) in enumerate(CLASSES.items(), start=1):
        (root / "UCF-101" / folder).mkdir(parents=True)
        for group in (1, 2, 3):
            name = f"{folder}/v_{stem}_g{group:02d}_c01.avi"
            write_avi(root / "UCF-101" / name, 12 if name == SHORT else 29, 100 + 30 * label + group)
            (test if group == 3 else train).append(name if group == 3 else f"{name} {label}")
    (lists / "classInd.txt").write_text("".join(f"{n} {name}\r\n" for n, name in enumerate(CLASSES, start=1)))
    (lists / "trainlist01.txt").write_text("\r\n".join(train) + "\r\n")
    (lists / "testlist01.txt").write_text("\r\n".join(test) + "\r\n")
    return root


def test_the_page_has_commands_that_are_understood():
    """Those that are not walked through below are parsed at least."""
    for command in commands():
        word, *arguments = command
        if word == "train":
            filled = arguments if "--out" in arguments else [*arguments, "--out", "run"]
            options = tyro.cli(TrainOptions, args=filled, config=(tyro.conf.OmitSubcommandPrefixes,))
            assert options.data
    assert len(commands()) >= 6


def test_two_sets_on_the_command_line():
    arguments = on_the_page("train", "--data", "clips")[1:]
    options = tyro.cli(TrainOptions, args=[*arguments, "--out", "run"], config=(tyro.conf.OmitSubcommandPrefixes,))
    assert options.data == (Path("clips"), Path("images:0.5"))


def test_counting_what_is_too_short(downloaded, monkeypatch, capsys):
    monkeypatch.chdir(downloaded)
    inspect = on_the_page("data", "inspect", "UCF-101")
    assert hpdm(with_options(inspect, frames=16)) == 1
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if ".avi" in line] == [f"UCF-101/{SHORT}"]
    assert "9 files of 3 classes" in out
    assert "problems: shorter than a window (1)" in out
    assert hpdm(with_options(inspect, frames=12)) == 0


def test_the_first_run(downloaded, monkeypatch, capsys, caplog, tmp_path):
    """On the clips of the list, without the short one, which the log counts; then from the same clips in shards."""
    monkeypatch.chdir(downloaded)
    small = {"steps": 2, "batch": 5, "workers": 0, "kernels": "torch"}
    first = with_options(on_the_page("train", "--preset", "tiny"), out=tmp_path / "first", **small)
    with caplog.at_level("INFO", "hpdm"):
        assert hpdm(first) == 0
    assert (
        f"1 of 6 clips have been left out so far, as shorter than a window; the first is UCF-101/{SHORT} (12"
        in caplog.text
    )
    run = runs.load(tmp_path / "first")
    assert run.classes == list(CLASSES)
    assert run.training["short"] == "skip"
    assert hpdm(with_options(on_the_page("data", "shard", "UCF-101"), clips_per_shard=4)) == 0
    assert "2 shards, 6 clips of 3 classes" in capsys.readouterr().out
    shards = with_options(on_the_page("train", "--preset", "hpdm_m", "--data", "ucf-train"), preset="tiny", **small)
    shards = with_options(shards, out=tmp_path / "shards", log_every=1)
    assert hpdm(shards) == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("first", "shards")
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_the_clips_of_the_split_are_the_listed_ones(downloaded):
    train, test = (VideoDataset(downloaded / "UCF-101", frames=16, size=32, split=side) for side in ("train", "test"))
    assert [file.path.rpartition("_g")[2][:2] for file in train.files] == ["01", "02"] * 3
    assert (train.labels, test.labels) == ([0, 0, 1, 1, 2, 2], [0, 1, 2])
    assert train.class_names == list(CLASSES)
