"""The detector-free score: near the truth on rendered clips, worse the more a clip is spoilt."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from hpdm.data.clips import VideoDataset
from hpdm.data.synthetic import CLASSES, bounce, render_clip, render_synthetic
from hpdm.evaluation.generated import measure
from hpdm.evaluation.motion import MotionScore, motion_table, read_synthetic_set
from hpdm.evaluation.synthetic_score import coverage, fit_motion, fit_template, score_clip


def rng():
    return np.random.default_rng(torch.seed() % 2**32)


@pytest.fixture(scope="module")
def clips():
    """One clip of each class."""
    return {name: render_clip(name, frames=12, rng=np.random.default_rng(7)) for name in CLASSES}


def scores(clips, spoil):
    return [score_clip(spoil(clip.frames), name) for name, clip in clips.items()]


@pytest.mark.parametrize("name", CLASSES)
def test_rendered_clips_are_read_to_a_fraction_of_a_pixel(name):
    clip = render_clip(name, frames=12, size=(64, 80), rng=rng())
    score = score_clip(clip.frames, name)
    error = np.hypot(*(score.position - clip.position).T)
    # Bounds: about 1.5 times the worst of 360 clips.
    assert np.median(error) < 0.45
    assert error.max() < 0.8
    assert score.residual < 0.45
    assert score.speed == pytest.approx(np.hypot(*clip.velocity[0]), abs=0.14)
    assert score.radius == pytest.approx(clip.radius, abs=0.5)
    assert (score.shape, score.color, score.found) == (name, name, 1.0)
    assert score.overlap > 0.9
    assert score.color_error < 6
    assert score.texture == pytest.approx(1, abs=0.23)


def test_speed_is_per_frame_of_the_file():
    clip = render_clip("RedDisc", frames=24, rng=rng())
    score = score_clip(clip.frames[::3], "RedDisc", np.arange(0, 24, 3))
    assert score.speed == pytest.approx(np.hypot(*clip.velocity[0]), abs=0.14)
    assert score.residual < 0.45


def test_motion_of_exact_positions_is_found_through_bounces():
    source, steps = rng(), np.arange(40.0)
    for _ in range(5):
        velocity = source.uniform(0.4, 1.5, 2) * source.choice([-1, 1], 2)
        start = source.uniform(20, 44, 2)
        where = np.stack([bounce(s, v, 20, 44, steps)[0] for s, v in zip(start, velocity)], axis=1)
        motion = fit_motion(where, steps, 20, (64, 64))
        assert motion.residual < 0.02
        assert motion.velocity == pytest.approx(velocity, abs=2e-3)


def test_residual_is_the_distance_from_a_straight_line():
    """Alternate offsets of +-d across the motion leave exactly d."""
    steps = np.arange(20.0)
    where = np.stack([26 + 0.5 * steps, 32 + 0.8 * (-1) ** steps], axis=1)
    assert fit_motion(where, steps, 20, (64, 64)).residual == pytest.approx(0.8, abs=0.02)


def noise(frames, sigma):
    spoilt = frames + np.random.default_rng(0).normal(size=frames.shape) * sigma
    return np.clip(spoilt, 0, 255).round().astype(np.uint8)


def blur(frames, sigma):
    reach = np.arange(-3 * sigma, 3 * sigma + 1)
    kernel = torch.from_numpy(np.exp(-0.5 * (reach / max(sigma, 0.1)) ** 2))
    kernel /= kernel.sum()
    video = torch.from_numpy(frames.astype(np.float64)).permute(0, 3, 1, 2)
    video = torch.nn.functional.pad(video, [3 * sigma] * 4, mode="replicate")
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        video = torch.nn.functional.conv2d(
            video, kernel.view(shape).expand(3, 1, *kernel.view(shape).shape[2:]), groups=3
        )
    return video.permute(0, 2, 3, 1).round().clamp(0, 255).numpy().astype(np.uint8)


def shake(frames, pixels):
    source = np.random.default_rng(0)
    return np.stack([np.roll(f, source.integers(-pixels, pixels + 1, 2), (0, 1)) for f in frames])


@pytest.mark.parametrize(
    ("spoil", "unit", "amounts", "worse"),
    [
        (noise, "sigma", (0, 30, 90), {"overlap": -1, "color_error": 1, "residual": 1, "texture": -1}),
        (blur, "sigma", (0, 2, 6), {"overlap": -1, "color_error": 1, "residual": 1, "texture": -1}),
        (shake, "pixels", (0, 1, 3), {"residual": 1}),
    ],
)
def test_the_more_a_clip_is_spoilt_the_worse_its_score(clips, spoil, unit, amounts, worse):
    rows = [scores(clips, partial(spoil, **{unit: amount})) for amount in amounts]
    for name, sign in worse.items():
        means = [sign * float(np.mean([getattr(s, name) for s in row])) for row in rows]
        if name == "overlap" and spoil is blur:
            means = means[1:]  # a little blur takes the texture away, which helps an overlap
        assert sorted(means) == means, (name, means)
        assert means[-1] > means[0], (name, means)


def test_a_frozen_clip_has_no_speed(clips):
    for score in scores(clips, lambda frames: frames[:1].repeat(len(frames), 0)):
        assert score.speed < 0.02


def test_frames_out_of_order_do_not_move_straight(clips):
    order = np.random.default_rng(1).permutation(12)
    assert np.median([s.residual for s in scores(clips, lambda frames: frames[order])]) > 1.5


@pytest.mark.parametrize("value", [0, 90, 255])
def test_a_picture_without_an_object_is_said_to_have_none(value):
    score = score_clip(np.full((4, 64, 64, 3), value, np.uint8), "RedDisc")
    assert (score.found, score.overlap, score.texture, score.residual) == (0, 0, 0, 64)
    assert np.isnan(score.position).all()


def test_another_class_is_recognised_as_what_it_is(clips):
    names = list(CLASSES)
    for name, other in zip(names, names[1:] + names[:1]):
        score = score_clip(clips[name].frames, other)
        assert (score.shape, score.color) == (name, name)
        assert score.overlap < 0.9
        assert score.color_error > 25


def test_coverage_of_a_painted_square_is_its_area():
    frames = np.full((1, 64, 64, 3), 30, np.uint8)
    frames[0, 10:40, 20:50] = (200, 90, 60)
    cover, color, contrast = coverage(frames)
    assert cover.sum() == pytest.approx(900, abs=1)
    assert color[0] == pytest.approx([200, 90, 60], abs=1)
    assert contrast[0] > 90
    found = fit_template(cover, "GreenSquare")
    assert found.position[0] == pytest.approx([35, 25], abs=0.05)
    assert found.radius[0] * 0.9 == pytest.approx(15, abs=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return render_synthetic(
        tmp_path_factory.mktemp("set") / "set", clips=2, frames=14, classes=["RedDisc", "CyanDiamond"]
    )


def dataset(folder, **changes):
    return VideoDataset(folder, **{"frames": 10, "size": 64, "train": False} | changes)


def scored(data, clips, names, real):
    return measure(((n, [clip]) for n, clip in enumerate(clips)), [MotionScore(data, names, real=real)])[0]


def test_real_clips_of_a_set_are_right_and_swapped_classes_are_not(folder):
    data = dataset(folder)
    items = [data[i] for i in range(len(data))]
    names = [data.class_names[item["label"]] for item in items]
    made = [item["video"] for item in items]
    result = scored(data, made, names, real=4)
    assert result["real"] == result["generated"]
    assert result["real"]["all_right"] == 1
    assert result["position_error"]["median"] < 0.3
    swapped = scored(data, made, names[::-1], real=4)["generated"]
    assert (swapped["shape_right"], swapped["color_right"], swapped["all_right"]) == (0, 0, 0)
    still = [clip[:, :1].expand_as(clip) for clip in made]
    frozen = scored(data, still, names, real=4)["generated"]
    assert (frozen["speed_right"], frozen["motion_right"], frozen["all_right"]) == (0, 0, 0)
    table = motion_table(result).splitlines()
    assert len(table) == 2 + len(result["real"])
    assert json.dumps(result)


def test_what_is_right_follows_the_scale_of_the_clips(folder):
    full, half = (read_synthetic_set(dataset(folder, size=size)) for size in (64, 32))
    assert (full.scale, half.scale, half.unit) == (1, 0.5, 32)
    assert half.radius == pytest.approx(np.array(full.radius) / 2)
    assert half.speed == pytest.approx(np.array(full.speed) / 2)
    data = dataset(folder, size=32)
    result = scored(data, [data[0]["video"]], [data.class_names[data[0]["label"]]], real=2)
    assert result["position_error"]["median"] < 0.3
    assert result["generated"]["motion_right"] == 1


def test_other_sets_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="cropped to 32x64, expected the same shape"):
        read_synthetic_set(dataset(folder, size=(32, 64)))
    with pytest.raises(ValueError, match=r"RedDisc has no metadata.jsonl, expected a set"):
        read_synthetic_set(dataset(folder / "RedDisc"))
    with pytest.raises(ValueError, match="name: got 'Cat'"):
        score_clip(np.zeros((2, 16, 16, 3), np.uint8), "Cat")
