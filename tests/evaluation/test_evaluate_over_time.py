"""``hpdm evaluate --metrics motion --over-time``: sampled videos and files of them, next to real clips."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from hpdm.commands.evaluate import evaluate, run
from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.given import GivenOptions
from hpdm.commands.over_time_options import OverTimeOptions
from hpdm.commands.sample import SampleOptions
from hpdm.commands.sample import run as sample
from hpdm.data.synthetic import render_clip, render_synthetic
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.over_time.sources import sample_long
from hpdm.long_video import LongOptions
from hpdm.patch.long_sampler import LongSampler
from hpdm.sampling import SamplerOptions
from hpdm.video import write_video
from tests.evaluation.test_evaluate import Features
from tests.processes import run_ranks
from tests.small import random_model, save_as_run, small_config

CLASSES = ["RedDisc", "GreenSquare"]
SAMPLER = SamplerOptions(steps=2, solver="heun", spacing="time")
LONG = {"patch": (4, 8, 8), "tokenizer": (1, 2, 2), "known_frames": True, "classes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of 48 frames, and runs with and without known frames and classes, none of which was trained."""
    root = tmp_path_factory.mktemp("over_time")
    render_synthetic(root / "set", clips=2, frames=48, size=(32, 32), classes=CLASSES)
    training = {"stride": 1, "short": "error"}
    for name, changes in (("run", {}), ("short", {"known_frames": False}), ("free", {"conditioning": "none"})):
        model = random_model(small_config(**(LONG | changes)))
        save_as_run(model, root / name, [] if name == "free" else CLASSES, training)
    torch.jit.script(Features().eval()).save(str(root / "i3d.pt"))
    return root


def options(folder, run="run", frames=32, samples=3, **changes):
    over_time = OverTimeOptions(
        frames, **{name: changes.pop(name) for name in ("unlabeled", "plot") if name in changes}
    )
    values = {"run_folder": folder / run, "data": folder / "set", "sampler": SAMPLER, "metrics": ("motion",),
              "device": "cpu", "kernels": "torch"}  # fmt: skip
    return EvaluateOptions(**(values | changes), samples=samples, over_time=over_time)


def test_sampled_videos_stand_beside_real_ones(folder, tmp_path, capsys):
    command = options(folder, plot=tmp_path / "curves.png", json=tmp_path / "out.json", batch=2)
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "32 frames of 3 generated videos and of 3 real ones" in printed
    assert "2 borders of windows, motion in 8 frames" in printed
    result = json.loads((tmp_path / "out.json").read_text())["over_time"]
    assert (result["borders"], result["times"], result["expected"]) == ([16, 24], [7.5, 23.5], "class")
    assert result["real"]["summary"]["shape_right"]["last"] == 1 > result["generated"]["summary"]["overlap"]["last"]
    assert [(track["shape"], track["color"]) for track in result["tracks"]] == [(c, c) for c in (*CLASSES, CLASSES[0])]
    assert result["origin"]["first_seed"] == 0
    assert result["origin"]["long"]["scheme"] == "autoregressive"
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_video_depends_neither_on_the_batch_nor_on_the_length(folder):
    two = evaluate(options(folder, batch=2))["over_time"]
    one = evaluate(options(folder, batch=1))["over_time"]
    longer = evaluate(options(folder, batch=3, frames=48))["over_time"]
    for short, other, long in zip(two["tracks"], one["tracks"], longer["tracks"]):
        for name, curve in short["curves"].items():
            # A pixel may be rounded to the other side.
            assert _numbers(curve) == pytest.approx(_numbers(other["curves"][name]), abs=0.05, nan_ok=True), name
            assert _numbers(curve) == pytest.approx(_numbers(long["curves"][name][:2]), abs=0.05, nan_ok=True), name


def _numbers(curve):
    return [float("nan") if value is None else value for value in curve]


def test_segments_are_the_whole_video_in_order():
    model, labels = random_model(small_config(**LONG)), [0, 1, 0]
    sampler = LongSampler(model, SAMPLER, LongOptions())
    found = {}
    for number, frames in sample_long(sampler, 5, labels, 3, 2, 30):
        found[number] = torch.cat([found[number], frames], dim=1) if number in found else frames
    assert sorted(found) == [0, 1, 2]
    for number, video in found.items():
        assert video.dtype == torch.uint8
        segments = sampler.segments([5 + number], 30, torch.tensor([labels[number]]))
        alone = torch.cat([segment.frames for segment in segments], dim=2)[0]
        assert video.shape == alone.shape == (3, 30, 32, 32)
        assert (video / 127.5 - 1 - alone).abs().max() < 0.01
    longer = {0: [], 1: [], 2: []}
    for number, frames in sample_long(sampler, 5, labels, 3, 3, 41):
        longer[number].append(frames)
    for number, parts in longer.items():
        video = torch.cat(parts, dim=1)
        assert video.shape[1] == 41
        assert (video[:, :30].int() - found[number].int()).abs().max() <= 1


def test_without_classes_a_video_is_compared_with_its_own_start(folder, capsys):
    for command in (options(folder, unlabeled=True), options(folder, run="free")):
        result = evaluate(command)["over_time"]
        assert result["expected"] == "start"
        assert result["real"]["summary"]["shape_right"]["last"] == 1
    assert run(command) == 0
    assert "shape and color are expected as in their own first 16 frames" in capsys.readouterr().out


def test_files_stand_in_for_sampling(folder, tmp_path):
    for seed in range(4):
        clip = render_clip(CLASSES[seed % 2], frames=40, size=(32, 32), rng=np.random.default_rng(seed))
        write_video(tmp_path / f"{CLASSES[seed % 2]}_seed{seed}.mp4", clip.frames, crf=4)
    command = options(folder, run="short", generated=tmp_path, samples=None)
    result = evaluate(command)["over_time"]
    assert (result["generated"]["videos"], result["real"]["videos"]) == (4, 4)
    for name in ("shape_right", "color_right", "found"):
        assert result["generated"]["curves"][name] == [1, 1]
    assert result["origin"]["generated"] == str(tmp_path)
    with pytest.raises(ValueError, match=r"seed1.mp4 has 40 frames of 32x32, expected at least 48 of 32x32"):
        evaluate(options(folder, generated=tmp_path, samples=None, frames=48))
    (tmp_path / "RedDisc_seed0.mp4").rename(tmp_path / "Other_seed0.mp4")
    with pytest.raises(ValueError, match=r"got file Other_seed0.mp4, expected CLASS_seedNUMBER.mp4"):
        evaluate(command)
    unlabeled = replace(command, over_time=replace(command.over_time, unlabeled=True))
    assert evaluate(unlabeled)["over_time"]["expected"] == "start"


def test_files_of_the_sample_command_are_read(folder, tmp_path):
    assert sample(SampleOptions(folder / "run", tmp_path / "videos", count=2, sampler=SAMPLER, device="cpu",
                                kernels="torch", given=GivenOptions(frames=32))) == 0  # fmt: skip
    result = evaluate(options(folder, generated=tmp_path / "videos", samples=None))["over_time"]
    assert [track["shape"] for track in result["tracks"]] == ["GreenSquare", "RedDisc"]  # files by name
    assert result["borders"] == [16, 24]


def test_processes_share_the_videos(folder, tmp_path):
    command = options(folder, metrics=("motion", "fvd", "kvd"), samples=3, batch=1, split="train", real_clips=9,
                      detector=folder / "i3d.pt")  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = json.loads(json.dumps(evaluate(command)))
    finally:
        torch.set_num_threads(threads)
    arguments = ["evaluate", "--run", folder / "run", "--data", folder / "set", "--metrics", *command.metrics,
                 "--detector", command.detector, "--split", "train", "--real-clips", 9, "--over-time", 32,
                 "--samples", 3, "--batch", 1, "--steps", 2, "--solver", "heun", "--spacing", "time",
                 "--overlap", "fhw", "--device", "cpu", "--kernels", "torch", "--json",
                 tmp_path / "two.json"]  # fmt: skip
    printed = run_ranks(["-m", "hpdm", *arguments], 2, TRITON_INTERPRET="0")
    assert [text.count("radius change") for text in printed] == [1, 0]
    assert json.loads((tmp_path / "two.json").read_text()) == alone
    distances = alone["over_time"]["distances"]
    assert (distances["videos"], distances["real"], len(distances["to_real"]["fvd"]["values"])) == (3, 9, 2)


def test_distances_of_files_need_neither_long_clips_nor_the_synthetic_set(folder, tmp_path, capsys, monkeypatch):
    """Real windows are of 16 frames from anywhere: --data has clips of 48 frames, the videos 70.

    The run could not sample videos of that length itself.
    """
    videos, data = tmp_path / "videos", tmp_path / "set"
    videos.mkdir()
    for seed in range(4):
        frames = render_clip("RedDisc", frames=70, size=(32, 32), rng=np.random.default_rng(seed)).frames
        write_video(videos / f"{seed}.mp4", frames, crf=4)
    for name in CLASSES:
        (data / name).mkdir(parents=True)
        for path in (folder / "set" / name).iterdir():
            (data / name / path.name).write_bytes(path.read_bytes())
    (data / "classInd.txt").write_text("1 RedDisc\n2 GreenSquare\n")
    command = options(folder, run="short", frames=70, samples=None, data=data, generated=videos,
                      metrics=("fvd", "kvd"), draws=2, real_clips=12, detector=folder / "i3d.pt",
                      plot=tmp_path / "curves.png", json=tmp_path / "out.json")  # fmt: skip
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert "70 frames of 4 generated videos, 16 at a time, and 12 real clips of 16" in printed
    assert "kvd to start" in printed
    assert (tmp_path / "curves.png").stat().st_size > 1000
    result = json.loads((tmp_path / "out.json").read_text())["over_time"]
    assert result["times"] == [7.5, 23.5, 39.5, 55.5]
    for name in ("fvd", "kvd"):
        curve, start = (result["distances"][side][name] for side in ("to_real", "to_start"))
        assert [len(curve["values"]), len(curve["draws"]), len(curve["draws"][0]), len(curve["std"])] == [4, 2, 4, 4]
        assert (len(start["values"]), start["first"]) == (4, pytest.approx(0, abs=1e-6))
    again = replace(command, statistics=tmp_path / "kept", draws=None)
    first = evaluate(again)["over_time"]["distances"]
    assert len(list((tmp_path / "kept").iterdir())) == 4 + 1  # a file per video, and the real clips
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "__call__", lambda *_: pytest.fail("computed again"))
        assert evaluate(again)["over_time"]["distances"] == first
        with pytest.raises(pytest.fail.Exception, match="computed again"):
            evaluate(replace(again, over_time=OverTimeOptions(48)))
    kept = next((tmp_path / "kept").glob("clips-*.npz"))
    kept.unlink()
    assert evaluate(again)["over_time"]["distances"]["to_real"]["fvd"]["values"] == pytest.approx(
        first["to_real"]["fvd"]["values"], rel=1e-3
    )
    kept.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"statistics: .*clips-\w+.npz is damaged .* delete it"):
        evaluate(again)
    for path in sorted(videos.iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="holds 1 video, expected at least 2 for a distance"):
        evaluate(command)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"frames": 64}, ValueError, r"data: .*got 48 frames, expected >= 64 .*`hpdm data synthetic --frames 64`"),
        ({"frames": 16}, ValueError, "over_time: got 16, expected at least 32 frames"),
        ({"frames": None, "unlabeled": True}, ValueError, "unlabeled: got True without over_time"),
        ({"plot": "curves.jpg"}, ValueError, "plot: got 'curves.jpg', expected a name ending in .png"),
        ({"plot": "nowhere/curves.png"}, FileNotFoundError, "plot: folder .* does not exist"),
        ({"level": (0,)}, ValueError, r"level: got \(0,\) with over_time, expected none"),
        ({"metrics": ("denoising",)}, ValueError, "over_time: got 32 without the metric motion"),
        ({"run": "short"}, ValueError, "frames: got 32, expected at most 16, the length of a clip"),
    ],
)
def test_what_a_user_can_get_wrong_is_named(folder, changes, error, match):
    if "plot" in changes:
        changes = changes | {"plot": folder / changes["plot"]}
    with pytest.raises(error, match=match):
        evaluate(options(folder, **changes))
