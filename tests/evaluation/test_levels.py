"""Levels one by one: real videos at their sizes, several measured from one sampling run, real ones given."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import tyro
from torch import nn

from hpdm import Sampler, presets, runs, systems
from hpdm.commands.evaluate import evaluate, run
from hpdm.commands.evaluate_options import EvaluateOptions
from hpdm.commands.sampler_choice import choose_sampler
from hpdm.data.clips import VideoDataset
from hpdm.data.synthetic import render_synthetic
from hpdm.evaluation.detector import Detector
from hpdm.evaluation.distribution import draw_labels
from hpdm.evaluation.given import GivenLevels
from hpdm.evaluation.levels import levels_of
from hpdm.evaluation.metrics import frechet_distance
from hpdm.evaluation.motion import MotionScore
from hpdm.patch.boxes import extract_patches
from hpdm.sampling import SamplerOptions
from hpdm.video import to_uint8, write_video
from tests.commands.test_third_system import LinearConfig, LinearSystem
from tests.evaluation.test_evaluate import Classes
from tests.evaluation.test_evaluate import Features as LongFeatures
from tests.small import random_model, save_as_run, small_config

PATCH = systems.get("patch")
CLASSES = ["RedDisc", "GreenSquare"]
SAMPLER = SamplerOptions(steps=2, overlap="none")  # a step on each later level


class Features(LongFeatures):
    """Takes as few frames as level 0 has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 3, (2, 3, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set, a run of 8x32x32 videos in three levels, and two detectors."""
    root = tmp_path_factory.mktemp("levels")
    render_synthetic(root / "set", clips=5, frames=10, size=(32, 32), classes=CLASSES)
    model = random_model(small_config(classes=2))
    save_as_run(model, root / "run", CLASSES, {"stride": 1, "short": "skip"})
    torch.jit.script(Features().eval()).save(str(root / "i3d.pt"))
    torch.jit.script(Classes().eval()).save(str(root / "c3d.pt"))
    return root


def options(folder, **changes):
    values = {"run_folder": folder / "run", "data": folder / "set", "sampler": SAMPLER, "batch": 4, "split": "train"}
    return EvaluateOptions(**(values | {"detector": folder / "i3d.pt", "frames": 4} | changes))


def block_means(video, growth):
    """A video ``[..., F, H, W]`` with every ``growth`` pixels of each axis averaged."""
    *rest, f, h, w = video.shape
    return (
        video.double().reshape(*rest, f // growth, growth, h // growth, growth, w // growth, growth).mean((-1, -3, -5))
    )


def test_a_level_of_a_real_video_is_what_its_patches_show(generator):
    config = small_config(patch=(2, 6, 10))
    video = torch.randint(256, (2, 3, 8, 24, 40), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[[0, 0, 0, 1, 1, 1], [0.25, 0.5, 0.35, 0.5, 0.5, 0.5], [0.375, 0.5, 0.6, 0.25, 0.25, 0.25]]])
    patches = extract_patches(video, boxes.repeat(2, 1, 1), config)
    for level, (f, h, w) in enumerate([(0, 0, 0), (1, 6, 7), (3, 12, 24)]):
        whole = PATCH.real_part(config, video, level)
        assert tuple(whole.shape[2:]) == PATCH.part_sizes(config)[level] == config.level_resolution(level)
        torch.testing.assert_close(whole[:, :, f : f + 2, h : h + 6, w : w + 10], patches[:, level], rtol=0, atol=2e-6)
        expected = block_means(video, 4 // 2**level) / 127.5 - 1
        torch.testing.assert_close(whole.double(), expected, rtol=0, atol=2e-6)
    first = PATCH.real_part(config, video[:, :, :4], 0)  # some of the frames: those of the level that they cover
    torch.testing.assert_close(first, PATCH.real_part(config, video, 0)[:, :, :1])
    with pytest.raises(ValueError, match=r"video: got size \(3, 24, 40\), expected a multiple of 4 frames of 24x40"):
        PATCH.real_part(config, video[:, :, :3], 0)
    with pytest.raises(ValueError, match="level: got 3, expected 0 to 2"):
        PATCH.real_part(config, video, 3)
    with pytest.raises(TypeError, match=r"expected torch\.uint8"):
        PATCH.real_part(config, video.float(), 0)


def test_a_system_without_levels_has_one():
    system, config = LinearSystem(), LinearConfig()
    (level,) = levels_of(system, config)
    assert (level.size, level.is_last, level.covered(3)) == ((4, 8, 8), True, 3)
    video = torch.randint(256, (3, 4, 8, 8), dtype=torch.uint8)
    assert torch.equal(level.real_pixels(video), video)
    with pytest.raises(ValueError, match="level: got 1, expected 0 to 0"):
        levels_of(system, config, [1])


def test_fvd_of_each_level_from_one_sampling_run(folder, monkeypatch):
    calls = []
    real_call = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda *a, **k: calls.append(a[1]) or real_call(*a, **k))
    command = options(folder, metrics=("fvd", "is"), level=(2, 0, 1), samples=10, classifier=folder / "c3d.pt")
    found = evaluate(command)["levels"]
    assert [list(numbers) for numbers in calls] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [(part["level"], part["size"]) for part in found] == [(2, [8, 32, 32]), (0, [2, 8, 8]), (1, [4, 16, 16])]

    dataset = VideoDataset(folder / "set", frames=8, size=32, split="train", short="skip")
    loaded, detector = runs.load(folder / "run"), Detector(folder / "i3d.pt", "features")
    videos = Sampler(loaded.model, SAMPLER)(range(10), torch.tensor(draw_labels(dataset.labels, 10, 0)))
    for part, frames, covered in zip(found, (4, 2, 4), (4, 8, 8)):
        distribution, growth = part["distribution"], 4 // 2 ** part["level"]
        windows = VideoDataset(folder / "set", frames=covered, size=32, split="train", short="skip")
        clips = torch.stack([windows[i]["video"] for i in range(len(windows))])
        clips = block_means(clips, growth).sub(1e-9).round().to(torch.uint8)
        rows = [detector(clips), detector(to_uint8(videos[part["level"]])[:, :, :frames])]
        gaussians = [
            f(r.double().numpy()) for r in rows for f in (lambda r: r.mean(0), lambda r: np.cov(r.T, bias=True))
        ]
        # Half a level of 255 may be rounded up or down.
        assert distribution["fvd"]["value"] == pytest.approx(frechet_distance(*gaussians), rel=1e-3)
        assert (distribution["frames"], distribution["frames_generated"]) == (frames, part["size"][0])
        assert (distribution["size"], distribution["fvd"]["real"]) == (part["size"][1:], len(windows))
        assert distribution["is"]["mean"] >= 1

        assert ("seams" in distribution) == (part["level"] == 2)
    seams = [Sampler(loaded.model, SAMPLER).seams(to_uint8(video) / 127.5 - 1) for video in videos[2]]
    for axis in "fhw":
        expected = sum(energies[axis] for energies in seams) / 10
        assert found[0]["distribution"]["seams"][axis] == pytest.approx(expected, rel=1e-4)

    alone = evaluate(replace(command, level=()))["distribution"]
    assert alone == {**found[0]["distribution"]}


def test_statistics_of_levels_are_kept_apart(folder, tmp_path):
    command = options(folder, metrics=("fvd",), level=(0, 1, 2), samples=2, statistics=tmp_path / "kept")
    first = evaluate(command)
    assert len(list((tmp_path / "kept").iterdir())) == 3
    assert evaluate(command) == first


def test_motion_of_levels_has_the_geometry_of_their_size(folder):
    dataset = VideoDataset(folder / "set", frames=8, size=32, train=False, short="skip")
    names = [dataset.class_names[dataset[i]["label"]] for i in range(len(dataset))]
    results = []
    for level in levels_of(PATCH, small_config(), [1, 2]):
        score = MotionScore(dataset, names, real=len(names), level=None if level.is_last else level)
        for number in range(len(dataset)):
            score.add(number, level.real_pixels(dataset[number]["video"]))
        results.append(score.result())
        assert results[-1]["generated"] == results[-1]["real"]
    half, whole = (result["real"] for result in results)
    for key in ("speed", "radius"):
        assert half[key] == pytest.approx(whole[key] / 2, rel=0.15)
    assert half["shape_overlap"] > 0.8
    assert half["color_right"] == 1
    assert results[0]["position_error"]["median"] < 0.5
    assert (half["texture"], whole["texture"] > 0.5) == (None, True)  # a period of one pixel


def test_given_levels_are_those_of_real_clips_of_the_class(folder, tmp_path, monkeypatch):
    config, labels = small_config(), [1, 0, 1, 1, 0, 1, 1, 1]
    dataset = VideoDataset(folder / "set", frames=8, size=32, train=False, short="skip")
    given = GivenLevels(dataset, levels_of(PATCH, config, [0, 1]), labels, len(labels))
    clips = [dataset.files.index(next(f for f in dataset.files if f.path == dataset[n]["path"])) for n in range(10)]
    assert clips == list(range(10))  # all can be read
    assert dataset.labels == [1] * 5 + [0] * 5
    # Two videos of class 0 take its first and third clip of five; six of class 1 take each of its five in turn.
    expected = [0, 5, 1, 2, 7, 3, 4, 0]
    for numbers in ([0, 1, 2], [7, 4]):
        levels = given(numbers)
        videos = torch.stack([dataset[expected[n]]["video"] for n in numbers])
        for level, found in enumerate(levels):
            means = block_means(videos, 4 // 2**level) / 127.5 - 1
            torch.testing.assert_close(found.double(), means, rtol=0, atol=2e-6)
    dataset.files[:] = [file for file in dataset.files if file.label == 0]
    with pytest.raises(ValueError, match="has no clip of GreenSquare"):
        GivenLevels(dataset, levels_of(PATCH, config, [0]), [0, 1], 2)

    seen = []
    real_call = Sampler.__call__

    def call(*arguments, finished=(), **more):
        videos = real_call(*arguments, finished=finished, **more)
        seen.append((finished, videos))
        return videos

    monkeypatch.setattr(Sampler, "__call__", call)
    command = options(folder, metrics=("motion",), samples=3, given_levels=2, json=tmp_path / "out.json")
    assert run(command) == 0
    origin = json.loads((tmp_path / "out.json").read_text())["motion"]["origin"]
    assert (origin["given_levels"], origin["given_split"], origin["first_seed"]) == (2, "train", 0)
    (finished, videos), = seen  # fmt: skip
    assert len(finished) == 2
    assert all(torch.equal(a, b) for a, b in zip(finished, videos))
    # The same noise as without given levels: with all but the last level given that the run samples itself, nothing
    # changes.
    sampled = real_call(Sampler(runs.load(folder / "run").model, SAMPLER), [0, 1, 2], torch.tensor([0, 1, 0]))
    again = real_call(
        Sampler(runs.load(folder / "run").model, SAMPLER), [0, 1, 2], torch.tensor([0, 1, 0]), finished=sampled[:2]
    )
    torch.testing.assert_close(again[2], sampled[2])


def test_a_clip_that_is_too_short_is_not_given(tmp_path):
    render_synthetic(tmp_path / "long", clips=2, frames=9, size=(32, 32), classes=CLASSES)
    render_synthetic(tmp_path / "short", clips=2, frames=3, size=(32, 32), classes=CLASSES)
    for path in (tmp_path / "short").rglob("*.mp4"):
        path.rename(tmp_path / "long" / path.parent.name / f"0_{path.name}")
    dataset = VideoDataset(tmp_path / "long", frames=8, size=32, train=False, short="skip")
    given = GivenLevels(dataset, levels_of(PATCH, small_config(), [2]), [1, 0, 1], 3)
    good = {label: [n for n, f in enumerate(dataset.files) if f.label == label][2:] for label in (0, 1)}
    for number, clip in enumerate((good[1][0], good[0][0], good[1][0])):  # asked for: clips 0, 0 and 2 of each class
        expected = dataset[clip]["video"] / 127.5 - 1
        torch.testing.assert_close(given([number])[0][0], expected)


def test_levels_of_files(folder, tmp_path):
    """With the names that ``hpdm sample --save-levels`` gives them."""
    videos = Sampler(runs.load(folder / "run").model, SAMPLER)(range(4), torch.tensor([0, 1, 0, 1]))
    for row, level in itertools.product(range(4), range(3)):
        name = f"{CLASSES[row % 2]}_seed{row}" + (f"_level{level}" if level < 2 else "")
        write_video(tmp_path / f"{name}.mp4", to_uint8(videos[level][row]))
    command = options(folder, metrics=("motion", "fvd"), level=(0, 1, 2), samples=4, generated=tmp_path)
    found = evaluate(command)["levels"]
    assert [part["motion"]["generated"]["clips"] for part in found] == [4, 4, 4]
    assert [part["distribution"]["generated"] for part in found] == [4, 4, 4]
    whole = evaluate(replace(command, level=()))
    assert whole["motion"] == found[2]["motion"]
    with pytest.raises(ValueError, match="holds 4 videos, expected at least the 5 samples"):
        evaluate(replace(command, samples=5))
    (tmp_path / "RedDisc_seed2_level1.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"RedDisc_seed2_level1.mp4 is missing, .* --save-levels"):
        evaluate(command)


def test_the_protocol_gives_the_overlap_and_the_model_the_solver_unless_they_are_given(folder):
    def chosen(*arguments, loaded, **defaults):
        words = ["--run", "r", "--data", "d", *arguments]
        return choose_sampler(loaded, tyro.cli(EvaluateOptions, args=words).sampler, **defaults)

    loaded = runs.load(folder / "run")
    text = loaded._replace(config=presets.hpdm_t2v())
    plain = SamplerOptions()
    assert chosen(loaded=loaded, overlap="hw") == replace(plain, overlap="hw")
    assert chosen(loaded=loaded, overlap=None) == plain
    assert chosen("--overlap", "fhw", loaded=loaded, overlap="hw") == plain
    assert chosen(loaded=text, overlap="hw") == replace(plain, overlap="hw", solver="heun")
    assert chosen("--solver", "edm", loaded=text).solver == "edm"
    assert type(chosen(loaded=loaded).overlap) is str
    default = EvaluateOptions(folder / "run", folder / "set").sampler
    for protocol, overlap in (("paper", "hw"), ("stylegan-v", "fhw")):
        command = options(folder, metrics=("motion",), samples=1, protocol=protocol, sampler=replace(default, steps=2))
        origin = evaluate(command)["motion"]["origin"]
        assert (origin["sampler"]["overlap"], origin["sampler"]["solver"]) == (overlap, "edm")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metrics": ("motion",), "level": (3,)}, "level: got 3, expected 0 to 2"),
        ({"metrics": ("motion",), "level": (1, 1)}, r"level: got \[1, 1\], expected different ones"),
        ({"metrics": ("motion",), "given_levels": 3}, "given_levels: got 3, expected 0 to 2 for a run of 3 level"),
        ({"metrics": ("motion",), "given_levels": -1}, "given_levels: got -1"),
        ({"metrics": ("motion",), "given_levels": 2, "level": (1, 2)}, "level: got 1, expected at least given_levels"),
        ({"given_levels": 1}, "given_levels: got 1 without a metric of videos"),
        ({"level": (1,)}, r"level: got \(1,\) without a metric of videos"),
        ({"metrics": ("motion",), "given_levels": 1, "generated": "."}, "given_levels: got 1 with --generated"),
    ],
)
def test_levels_that_cannot_be_measured_are_named(folder, changes, match):
    with pytest.raises(ValueError, match=match):
        evaluate(options(folder, **changes))
