"""The commands of the README, in order, as a user runs them: processes, files and exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
from PIL import Image

SMALL = ["--patch", "2", "8", "8", "--resolution", "8", "32", "32", "--batch", "2", "--log-every", "1"]


def hpdm(*arguments, check=True, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hpdm", *map(str, arguments)]
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    if check and done.returncode:
        raise AssertionError(f"{command} exits {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("end_to_end")
    hpdm("data", "synthetic", root / "clips", "--clips", 4, "--frames", 10, "--size", 32, 32)
    hpdm("train", "--data", root / "clips", "--out", root / "run", "--steps", 4, "--save-every", 2, *SMALL)
    return root


def test_sampling_a_trained_run(folder):
    out = folder / "videos"
    done = hpdm("sample", "--run", folder / "run", "--out", out, "--classes", "RedDisc", "3", "--count", 2,
                "--steps", 4, "--seed", 5, "--guidance", 2, "--columns", 4, "--real", folder / "clips")  # fmt: skip
    assert "tiles per level 1/27/343, steps 4/2/2" in done.stdout
    videos = sorted(out.glob("*.mp4"))
    assert [v.name for v in videos] == ["RedDisc_seed5.mp4", "YellowRing_seed6.mp4"]
    for path in videos:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 8
        assert frames[0].shape == (32, 32, 3)
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 4 * 32
        assert sheet.height > 4 * 32  # a real clip above each


def test_the_same_seed_gives_the_same_video_with_kernels_off(folder):
    for kernels in ("reference", "torch"):
        hpdm("sample", "--run", folder / "run", "--out", folder / kernels, "--count", 1, "--steps", 2,
             "--solver", "2m", "--overlap", "hw", "--kernels", kernels)  # fmt: skip
    frames = []
    for kernels in ("reference", "torch"):
        with Image.open(folder / kernels / "contact_sheet.png") as sheet:
            frames.append(sheet.convert("RGB").tobytes())
    difference = max(abs(a - b) for a, b in zip(*frames))
    assert difference <= 1  # one step of 255: a rounding at .5


def test_evaluating_a_run(folder):
    result = folder / "result.json"
    hpdm(
        "evaluate",
        "--run",
        folder / "run",
        "--data",
        folder / "clips",
        "--split",
        "test",
        "--clips",
        4,
        "--json",
        result,
    )
    values = json.loads(result.read_text())
    assert values["step"] == 4
    assert len(values["error"]) == 3


def test_a_killed_run_resumes(folder):
    """SIGKILL in the middle of a run that saves at every step: the same command goes on and finishes."""
    out = folder / "killed"
    arguments = ["train", "--data", folder / "clips", "--out", out, "--steps", 12, "--save-every", 1, *SMALL]
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "hpdm", *map(str, arguments)], env=env, stderr=subprocess.DEVNULL
    ) as run:
        deadline = time.monotonic() + 120
        while not list(out.glob("checkpoints/step-*")) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert list(out.glob("checkpoints/step-*"))
    hpdm(*arguments)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "{root}/nowhere", "--out", "{root}/x"], "nowhere is not a folder"),
        (["train", "--data", "{root}/clips", "--out", "{root}/x", "--preset", "big"], "preset: got 'big'"),
        (["train", "--data", "{root}/clips", "--out", "{root}/x"], "10 frames, expected >= 16"),
        (
            ["train", "--data", "{root}/clips", "--out", "{root}/x", "--kernels", "triton", *SMALL],
            "'triton' cannot run",
        ),
        (["sample", "--run", "{root}/clips", "--out", "{root}/x"], "has no config.json"),
        (["sample", "--run", "{root}/run", "--out", "{root}/x", "--classes", "Dog"], "classes: got 'Dog'"),
        (["sample", "--run", "{root}/run", "--out", "{root}/x", "--overlap", "z"], "overlap: got 'z'"),
        (["data", "inspect", "{root}/nowhere"], "nowhere"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(folder, arguments, message):
    done = hpdm(*(a.format(root=folder) for a in arguments), check=False)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "table", "plan", "data"])
def test_every_command_explains_itself(command):
    assert "usage: hpdm" in hpdm(command, "--help").stdout
