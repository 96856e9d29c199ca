"""Measurements over time: nothing is found in rendered clips, and each kind of damage is found as large as it is."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from hpdm.data.decode import read_clip
from hpdm.data.synthetic import CLASSES, render_clip
from hpdm.evaluation.over_time.borders import BorderWindows
from hpdm.evaluation.over_time.changes import FrameChanges
from hpdm.evaluation.over_time.heading import unexplained_turn
from hpdm.evaluation.over_time.report import over_time_table, plot_over_time
from hpdm.evaluation.over_time.score import compare, measure_tracks
from hpdm.evaluation.over_time.summary import jackknife_error, mean, slope, standard_error, times_of
from hpdm.evaluation.over_time.video import MEANING
from hpdm.evaluation.synthetic_score import Motion
from hpdm.video import write_video
from tests.evaluation.painted import paint, straight

BORDERS = list(range(16, 256, 8))


def pieces(videos, length=50):
    """All videos in pieces, which alternate."""
    for start in range(0, max(len(video) for video in videos), length):
        for number, video in enumerate(videos):
            part = torch.from_numpy(video[start : start + length])
            if len(part):
                yield number, part.permute(3, 0, 1, 2)


def tracks_of(videos, names, borders=(), steps=None):
    return measure_tracks(pieces(videos), names, np.arange(len(videos[0])) if steps is None else steps, borders)


def track_of(video, name="RedDisc", borders=()):
    return tracks_of([video], None if name is None else [name], borders)[0]


@pytest.fixture(scope="module")
def rendered():
    """Rendered clips of 256 frames, and their measurements."""
    names = ["RedDisc", "BlueTriangle"]
    clips = [render_clip(name, frames=256, rng=np.random.default_rng(n)) for n, name in enumerate(names)]
    return names, clips, tracks_of([clip.frames for clip in clips], names, BORDERS)


def test_rendered_clips_neither_drift_nor_jump(rendered):
    _, clips, tracks = rendered
    found = compare(tracks, tracks, 256, BORDERS, own_start=False)["real"]
    summary, borders = found["summary"], found["borders"]
    for name in ("found", "shape_right", "color_right"):
        assert (summary[name]["first"], summary[name]["last"], summary[name]["slope"]) == (1, 1, 0)
    assert all(value == 0 for value in found["curves"]["frozen"])
    assert max(max(track.curves["background_error"]) for track in tracks) < 0.5  # rounding alone: 0.29
    bounds = {"color_error": 0.2, "overlap": 0.01, "radius_change": 0.05, "residual": 0.03, "speed": 0.02,
              "turn": 1.5, "texture": 0.02, "background_error": 0.01}  # fmt: skip
    for name, bound in bounds.items():
        assert abs(summary[name]["slope"]) < bound, name
    assert borders["residual_ratio"] == pytest.approx(1, abs=0.1)
    assert borders["seam"] == pytest.approx(1, abs=0.1)
    assert (borders["frames"], borders["at_borders"]["windows"], borders["inside"]["windows"]) == (8, 60, 62)
    for clip, track in zip(clips, tracks):
        assert track.curves["speed"] == pytest.approx(np.full(16, np.hypot(*clip.velocity[0])), abs=0.14)
        assert np.nanmax(track.curves["turn"]) < 12


def test_compressed_clips_neither_drift_nor_freeze(tmp_path, rendered):
    names, clips, _ = rendered
    write_video(tmp_path / "clip.mp4", clips[0].frames[:64], crf=18)
    track = track_of(read_clip(tmp_path / "clip.mp4", range(64)).frames, names[0])
    assert track.curves["background_error"].max() < 1
    assert track.curves["frozen"].max() == 0


def test_how_a_video_arrives_changes_nothing(rendered):
    names, clips, tracks = rendered
    for length in (7, 64):
        found = measure_tracks(pieces([clips[1].frames[:64]], length), names[1:2], np.arange(64), [16])[0]
        for name in MEANING:
            assert np.array_equal(found.curves[name], tracks[1].curves[name][:4], equal_nan=True), name


def test_a_video_that_ends_early_is_named():
    video = paint("RedDisc", straight(32, (0.5, 0.6)))
    with pytest.raises(ValueError, match="frames: got 32 of video 0, expected 48"):
        measure_tracks(pieces([video]), None, np.arange(48), [])


def test_a_jump_at_each_border_is_found():
    borders = list(range(16, 128, 8))
    jumps = np.zeros((128, 2))
    for n, border in enumerate(borders):
        jumps[border:, 1] += 3 * (-1) ** n
    smooth = straight(128, (0.9, 0.1), start=(28, 30), radius=14)  # vertically it meets no wall
    videos = [paint("RedDisc", path, radius=14) for path in (smooth, smooth + jumps)]
    tracks = tracks_of(videos, ["RedDisc"] * 2, borders)
    calm, shaken = (compare([t], [t], 128, borders, own_start=False)["generated"]["borders"] for t in tracks)
    assert calm["residual_ratio"] == pytest.approx(1, abs=0.2)
    assert shaken["inside"]["residual"] == pytest.approx(calm["inside"]["residual"], abs=0.03)
    # Of a step of d within 8 frames, a straight line leaves d sqrt(1/4 - 4/21) at best: about 0.24 d.
    assert shaken["at_borders"]["residual"] == pytest.approx(3 * math.sqrt(1 / 4 - 4 / 21), rel=0.15)
    assert shaken["residual_ratio"] > 5
    assert calm["seam"] == pytest.approx(1, abs=0.15)
    assert shaken["seam"] > 2


def test_a_seam_is_the_energy_across_borders_over_that_elsewhere():
    changes, levels = FrameChanges(), np.cumsum([1, 2, 2, 6, 2, 2, 6, 2])
    for part in (levels[:3], levels[3:]):
        changes.add(np.broadcast_to(part[:, None, None, None], (len(part), 4, 4, 3)).astype(np.uint8))
    assert changes.seam([3, 6]) == pytest.approx(9)
    assert changes.levels[1:] == [2, 2, 6, 2, 2, 6, 2]
    assert math.isnan(changes.seam([]))


def test_a_drift_of_color_is_recovered():
    """A color that darkens by 10 % in 100 frames: the error grows by 0.8 times the root mean square of that."""
    rgb = np.array(CLASSES["RedDisc"][2])
    color = rgb * (1 - 0.001 * np.arange(160))[:, None]
    track = track_of(paint("RedDisc", straight(160, (0.8, 0.5)), color=color))
    expected = 0.8 * 10 * np.sqrt(((rgb / 100) ** 2).mean())
    assert slope(track.curves["color_error"]) == pytest.approx(expected, rel=0.05)
    assert track.curves["color_right"].min() == 1
    assert abs(slope(track.curves["background_error"])) < 0.05


def test_a_drift_of_the_background_is_recovered():
    frames = paint("CyanDiamond", straight(128, (0.8, 0.5)), radius=18).astype(np.float64)
    drift = 8 / 100 * np.arange(128)[:, None, None, None]
    video = np.clip(frames + drift * np.array([1, -1, 1]), 0, 255).round().astype(np.uint8)
    errors = track_of(video, "CyanDiamond").curves["background_error"]
    # The error of the first clip is what is left of its mean. Pixels are free in some frames of a clip only.
    expected = 8 / 100 * (times_of(8) - times_of(8)[0])
    assert errors[1:] == pytest.approx(expected[1:], abs=0.25)
    assert slope(errors[1:]) == pytest.approx(8, rel=0.05)


def test_growth_is_the_change_of_the_radius():
    path = straight(64, (0.5, 0.3), radius=24)
    radii = 16 + 4 / 100 * np.arange(64)
    video = np.concatenate([paint("RedDisc", path[t : t + 1], radius=r) for t, r in enumerate(radii)])
    track = track_of(video)
    assert track.curves["radius_change"][0] == 0
    assert slope(track.curves["radius_change"]) == pytest.approx(4, rel=0.05)


def test_repeated_frames_are_counted():
    shown = np.arange(96)
    frozen = [5, 6, 20, 21, 22, 23, 50, 80, 95]
    for t in frozen:
        shown[t] = shown[t - 1]
    video = paint("RedDisc", straight(96, (0.9, 0.7)))
    fractions = track_of(video[shown]).curves["frozen"]
    counts = [sum(16 * n <= t < 16 * n + 16 for t in frozen) for n in range(6)]
    assert fractions == pytest.approx(np.array(counts) / np.array([15, 16, 16, 16, 16, 16]))
    assert track_of(video[:32].repeat(3, axis=0)).curves["frozen"].mean() == pytest.approx(2 / 3, abs=0.01)


def test_frames_that_repeat_in_real_clips_too_do_not_count_as_frozen():
    changes = FrameChanges()
    changes.add(np.zeros((4, 2, 2, 3), np.uint8))
    assert changes.frozen(range(4), np.array([0, 0, 1, 1])) == 1
    assert math.isnan(changes.frozen(range(2), np.array([0, 0, 1, 1])))


def test_a_change_of_class_is_seen_from_its_frame_on():
    path = straight(96, (0.6, 0.4))
    video = np.concatenate([paint("RedDisc", path[:48]), paint("GreenSquare", path[48:])])
    asked, own = track_of(video, "RedDisc"), track_of(video, None)
    assert own.expected == ("RedDisc", "RedDisc")
    for track in (asked, own):
        for name in ("shape_right", "color_right"):
            assert track.curves[name].tolist() == [1, 1, 1, 0, 0, 0]
        assert np.diff(track.curves["color_error"])[2] > 50
    other = track_of(video, "GreenSquare")
    assert other.curves["shape_right"].tolist() == [0, 0, 0, 1, 1, 1]


def test_shape_and_color_of_the_start_need_not_be_of_one_class():
    path = straight(32, (0.6, 0.4))
    video = paint("GreenSquare", path, color=np.array([CLASSES["RedDisc"][2]]))
    track = track_of(video, None)
    assert track.expected == ("GreenSquare", "RedDisc")
    assert track.curves["shape_right"].tolist() == track.curves["color_right"].tolist() == [1, 1]
    assert track.curves["color_error"].max() < 5


def test_a_reversal_in_the_open_is_a_turn_and_one_at_a_wall_is_none():
    radius = 14.0
    there = np.stack([20 + 0.3 * np.arange(48), 24 + 0.4 * np.arange(48)], axis=1)
    back = there[-1] - np.arange(1, 49)[:, None] * np.array([0.3, 0.4])
    turns = track_of(paint("RedDisc", np.concatenate([there, back]), radius)).curves["turn"]
    assert math.isnan(turns[0])
    assert turns[3] == pytest.approx(180, abs=10)
    assert np.delete(turns, [0, 3]).max() < 10
    walls = straight(96, (0.9, 0.7), start=(30, 30), radius=radius)
    assert np.nanmax(track_of(paint("RedDisc", walls, radius)).curves["turn"]) < 10


def test_turns_are_measured_against_the_continued_motion():
    def motion(position, velocity):
        return Motion(0.0, np.array(velocity), np.array(position))

    size = (64, 64)
    before = motion((30.0, 30.0), (0.5, 0.5))
    angle = np.radians(45 + 20)
    turned = motion((38.0, 38.0), (0.7 * np.cos(angle), 0.7 * np.sin(angle)))
    assert unexplained_turn(before, turned, 16, 16, size) == pytest.approx(20)
    # Reflected after 36 frames, at x = y = 48.
    assert unexplained_turn(before, motion((42.0, 42.0), (-0.5, -0.5)), 48, 16, size) == pytest.approx(0, abs=1e-4)
    assert unexplained_turn(before, motion((42.0, 42.0), (0.5, 0.5)), 48, 16, size) == pytest.approx(180)
    # At the wall either side is right.
    for side in (-0.5, 0.5):
        assert unexplained_turn(before, motion((47.5, 47.5), (side, side)), 35, 16, size) == pytest.approx(0, abs=1e-4)
    assert math.isnan(unexplained_turn(before, motion((38.0, 38.0), (0.05, 0.0)), 16, 16, size))


def test_a_speed_that_dies_is_followed():
    """Along x the object moves by 1.2 exp(-t / 30) a frame; no wall is near."""
    time = np.arange(128)
    x = 14 + 1.2 * 30 * (1 - np.exp(-time / 30))
    path = np.stack([x, np.full(128, 32.0)], axis=1)
    track = track_of(paint("RedDisc", path, radius=10), "RedDisc")
    expected = [abs(np.polyfit(time[:16], x[16 * n : 16 * n + 16], 1)[0]) for n in range(8)]
    assert track.curves["speed"] == pytest.approx(np.array(expected), abs=0.03)
    decay = np.polyfit(times_of(8)[:5], np.log(track.curves["speed"][:5]), 1)[0]
    assert decay == pytest.approx(-1 / 30, rel=0.1)
    assert track.curves["frozen"][0] == 0
    assert track.curves["frozen"][-1] == 1


def test_a_video_without_an_object_has_no_values_of_one():
    track = track_of(np.full((32, 64, 64, 3), 50, np.uint8), None)
    assert track.expected == ("", "")
    assert track.curves["found"].tolist() == [0, 0]
    for name in ("color_error", "residual", "speed", "turn", "radius_change", "texture"):
        assert np.isnan(track.curves[name]).all(), name
    for name in ("shape_right", "color_right", "overlap"):
        assert track.curves[name].tolist() == [0, 0]
    assert track.curves["background_error"].max() < 1e-9
    result = compare([track], [track], 32, [], own_start=True)
    assert result["generated"]["summary"]["speed"] == {
        "first": None, "last": None, "slope": None, "slope_error": None
    }  # fmt: skip
    assert "no window but the first" in over_time_table(result)


def test_windows_at_borders_cross_that_border_alone_and_those_inside_none():
    for borders, frames, length in (
        (list(range(16, 240, 8)), 240, 8),
        (list(range(16, 96, 16)), 96, 16),
        (list(range(64, 256, 48)), 250, 16),
        ([16], 32, 16),
    ):
        windows = BorderWindows.of(borders, frames)
        assert windows.frames == length
        assert windows.at_borders
        assert windows.inside
        for window in windows.at_borders:
            (crossed,) = [b for b in borders if window.start < b < window.stop]
            assert crossed - window.start == window.stop - crossed
        for window in windows.inside:
            assert not [b for b in borders if window.start < b < window.stop]
        for window in (*windows.at_borders, *windows.inside):
            assert len(window) == length
            assert window.start >= 0
            assert window.stop <= frames
    assert BorderWindows.of([], 64) == BorderWindows.of([8, 12, 16], 64) == BorderWindows(0, [], [])


def test_noise_is_told_from_drift():
    source = np.random.default_rng(0)
    rows = [5 + 0.03 * times_of(16) + source.normal(size=16) for _ in range(200)]
    slopes = [slope(row) for row in rows]
    assert mean(slopes) == pytest.approx(3, abs=4 * standard_error(slopes))
    spread = times_of(16) - times_of(16).mean()
    assert standard_error(slopes) == pytest.approx(100 / math.sqrt(200 * spread @ spread), rel=0.2)
    assert slope(np.array([np.nan, 1.0, np.nan, 2.0])) == pytest.approx(100 / 32)
    assert math.isnan(slope(np.array([np.nan, 1.0])))
    assert standard_error([1.0]) is None
    # Of a mean, the jackknife's error is the standard error itself.
    assert jackknife_error(mean, slopes) == pytest.approx(standard_error(slopes))


def test_real_and_generated_videos_stand_side_by_side(rendered, tmp_path):
    _, _, tracks = rendered
    result = compare(tracks, tracks[:1], 256, BORDERS, own_start=False)
    table = over_time_table(result)
    assert "256 frames of 1 generated videos and of 2 real ones" in table
    for name in MEANING:
        assert name.replace("_", " ") in table
    plot_over_time(result, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 10
