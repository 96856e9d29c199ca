"""Which frames a window shows: counted, or nearest in time by the frames' own times."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from hpdm.data.clips import ShortClipError, VideoDataset
from hpdm.data.decode import VideoInfo, probe
from hpdm.data.order import ClipKey
from hpdm.data.resize import resize_and_crop
from hpdm.data.windows import Window


def clip(frames, fps=25.0, times=None):
    return VideoInfo("a", frames, 8, 8, fps, "h264", 1, 0, times=times)


def test_frames_are_counted_without_a_rate():
    window = Window(frames=4, stride=3, fps=None)
    assert window.starts(clip(12)) == 3
    assert window.numbers(clip(12), 2) == [2, 5, 8, 11]
    assert window.starts(clip(9)) == 0
    assert window.numbers(clip(9), 0) == [0, 3, 6, 0], "goes on from the first frame"
    assert window.too_short(clip(9)) == "got 9 frames, expected >= 10 (frames=4, stride=3)"


def test_even_frames_are_resampled_by_their_rate():
    window = Window(frames=4, stride=1, fps=10)
    assert window.numbers(clip(40), 5) == [5, 8, 10, 13]  # at 0, 2.5, 5 and 7.5 frames
    assert window.starts(clip(9)) == 1
    assert window.starts(clip(8)) == 0


# A still screen, a picture every half second for two seconds; then ten a second for one.
RECORDED = (0.0, 0.5, 1.0, 1.5, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0)


def recorded():
    return clip(15, fps=14 / 3.0, times=RECORDED)


def test_frames_at_any_times_are_taken_nearest_in_time():
    window = Window(frames=5, stride=1, fps=4)  # every 0.25 s
    assert window.numbers(recorded(), 0) == [0, 0, 1, 1, 2]  # of two that are equally near, the one that is shown
    assert window.numbers(recorded(), 4) == [4, 6, 9, 11, 14]  # 2.25 lies between 2.2 and 2.3
    assert window.numbers(recorded(), 3) == [3, 3, 4, 6, 9]  # from 1.5 s


def test_a_window_starts_where_it_ends_within_the_clip():
    window = Window(frames=5, stride=1, fps=4)  # spans 1 s
    # The last frame is shown for a while, half the mean distance of 0.21 s counts.
    assert window.starts(recorded()) == 1 + max(i for i, t in enumerate(RECORDED) if t + 1 <= 3 + 0.5 * 3 / 14)
    assert Window(frames=2, stride=1, fps=0.5).starts(recorded()) == 3  # spans 2 s: from 0, 0.5 and 1 s
    long = Window(frames=6, stride=1, fps=1)  # spans 5 s
    assert long.starts(recorded()) == 0
    assert long.too_short(recorded()) == "got 3.00 s, expected >= 5.00 s (frames=6, stride=1, fps=1)"
    # It lasts 3 s and the mean time of a frame, 3.214 s, and then goes on from its first frame.
    assert long.numbers(recorded(), 0) == [0, 2, 4, 14, 2, 4]  # the last two at 0.786 and 1.786 s


def write_times(path, times_ms, height=32, width=32, aspect=None):
    """A video of one gray value per frame, the frame's number times ten, shown at these times."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30, options={"crf": "4", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for number, time in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 10 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_file_of_variable_rate_from_its_packets_to_its_windows(tmp_path, name):
    path = write_times(tmp_path / name, [round(1000 * t) for t in RECORDED])
    info = probe(path)
    assert info.fps == pytest.approx(14 / 3, abs=0.02)
    assert info.times == pytest.approx(RECORDED, abs=0.002)
    data = VideoDataset(tmp_path, frames=5, size=32, fps=4)
    for epoch in range(20):
        item = data[ClipKey(0, epoch)]
        shown = (item["video"].float().mean((0, 2, 3)) / 10).round().int().tolist()
        wanted = RECORDED[item["start"]] + 0.25 * np.arange(5)
        best = np.abs(np.array(RECORDED) - wanted[:, None]).min(axis=1)
        assert np.abs(np.array(RECORDED)[shown] - wanted) == pytest.approx(best, abs=0.003)
    with pytest.raises(ShortClipError, match=r"got 3\.00 s, expected >= 5\.00 s"):
        VideoDataset(tmp_path, frames=6, size=32, fps=1, short="error")[0]


def test_rounded_times_are_even(tmp_path):
    info = probe(write_times(tmp_path / "a.mkv", [round(1000 * i / 30) for i in range(20)]))
    assert (info.fps, info.times) == (30, None)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(2), 32), (Fraction(1, 2), 128), (Fraction(64, 45), 45)])
def test_pixels_that_are_not_square_are_shown_as_a_player_shows_them(tmp_path, aspect, width):
    """A bright square of the shown picture, 64 wide and 64 high, from pixels of any shape."""
    height = 64
    stored = np.zeros((8, height, width, 3), np.uint8)
    left, right = round(16 / aspect), round(48 / aspect)
    stored[:, 16:48, left:right] = 255
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.codec_context.sample_aspect_ratio = aspect
        for image in stored:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    info = probe(path)
    assert (info.height, info.width) == (height, width)
    assert info.pixel_aspect == pytest.approx(float(aspect))
    bright = VideoDataset(tmp_path, frames=1, size=64)[0]["video"][0, 0] > 128
    assert int(bright.any(1).sum()) == pytest.approx(32, abs=1)
    assert int(bright.any(0).sum()) == pytest.approx(32, abs=2)


def test_one_frame_is_resized_as_in_a_clip(generator):
    clip = torch.randint(0, 256, (5, 37, 61, 3), generator=generator, dtype=torch.uint8)
    for size, aspect in (((16, 16), 1.0), ((37, 61), 1.0), ((64, 20), 1.3), ((12, 40), 0.6)):
        whole = resize_and_crop(clip, size, aspect)
        assert whole.shape == (5, *size, 3)
        for i in range(5):
            assert torch.equal(resize_and_crop(clip[i : i + 1], size, aspect)[0], whole[i])
