"""mp4 and contact sheets: what is written reads back, and a failed write leaves nothing behind."""

import os
import resource
from contextlib import contextmanager

import av
import numpy as np
import pytest
import torch
from PIL import Image

from hpdm.files import atomic_folder, atomic_path, write_text
from hpdm.video import as_frames, contact_sheet, write_contact_sheet, write_video


def smooth_clip(generator, frames=6, height=32, width=48):
    """Random low-frequency frames, which H.264 keeps closely."""
    coarse = 0.25 + 0.5 * torch.rand(frames, 3, 2, 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (fine * 255).to(torch.uint8).permute(1, 0, 2, 3)


def read_all(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.average_rate, stream.codec_context.pix_fmt


@contextmanager
def disk_of(size):
    """Files of this process cannot grow past ``size`` bytes: writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("height", "width", "pix_fmt"), [(32, 48, "yuv420p"), (33, 48, "yuv444p"), (32, 47, "yuv444p"), (16, 18, "yuv420p")]
)
def test_written_video_reads_back(tmp_path, generator, height, width, pix_fmt):
    clip = smooth_clip(generator, height=height, width=width)
    write_video(tmp_path / "a.mp4", clip, 12.5, crf=5)
    frames, rate, got_fmt = read_all(tmp_path / "a.mp4")
    assert frames.shape == (6, height, width, 3)
    assert (float(rate), got_fmt) == (12.5, pix_fmt)
    error = np.abs(frames.astype(int) - clip.permute(1, 2, 3, 0).numpy())
    assert error.mean() < 3
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_both_layouts_write_the_same_video(tmp_path, generator):
    clip = smooth_clip(generator)
    write_video(tmp_path / "a.mp4", clip)
    write_video(tmp_path / "b.mp4", clip.permute(1, 2, 3, 0).numpy())
    assert np.array_equal(read_all(tmp_path / "a.mp4")[0], read_all(tmp_path / "b.mp4")[0])


def test_a_shape_that_fits_both_layouts_follows_its_kind(generator):
    clip = torch.randint(0, 256, (3, 5, 7, 3), generator=generator, dtype=torch.uint8)
    assert as_frames("frames", clip).shape == (5, 7, 3, 3)
    assert as_frames("frames", clip.numpy()).shape == (3, 5, 7, 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"frames": torch.zeros(3, 4, 8, 8)}, TypeError, "frames: got dtype float32"),
        ({"frames": [1]}, TypeError, "frames: got list"),
        ({"frames": torch.zeros(4, 4, 8, 8, dtype=torch.uint8)}, ValueError, r"frames: got shape \(4, 4, 8, 8\)"),
        ({"frames": torch.zeros(3, 0, 8, 8, dtype=torch.uint8)}, ValueError, "frames: got shape"),
        ({"fps": 0}, ValueError, "fps: got 0"),
        ({"crf": 52}, ValueError, "crf: got 52"),
        ({"path": "a.avi"}, ValueError, "path: got 'a.avi'"),
        ({"path": "missing/a.mp4"}, FileNotFoundError, "missing does not exist"),
    ],
)
def test_write_video_names_the_bad_argument(tmp_path, change, error, match):
    arguments = {"path": "a.mp4", "frames": torch.zeros(3, 2, 8, 8, dtype=torch.uint8), "fps": 8, **change}
    with pytest.raises(error, match=match):
        write_video(tmp_path / arguments.pop("path"), arguments.pop("frames"), **arguments)
    assert os.listdir(tmp_path) == []


def test_full_disk_leaves_the_old_video_and_no_debris(tmp_path, generator):
    noise = torch.randint(0, 256, (3, 8, 64, 64), generator=generator, dtype=torch.uint8)
    path = tmp_path / "a.mp4"
    write_video(path, noise[:, :1], crf=40)
    before = path.read_bytes()
    with disk_of(20_000), pytest.raises(OSError):
        write_video(path, noise, crf=0)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_disk_that_fills_at_any_point_is_noticed(tmp_path, generator):
    """Also when the last byte of the index, written at the end, is what does not fit."""
    clip = smooth_clip(generator)
    write_video(tmp_path / "whole.mp4", clip)
    size = (tmp_path / "whole.mp4").stat().st_size
    for limit in (0, size // 2, size - 300, size - 1):
        with disk_of(limit), pytest.raises(OSError):
            write_video(tmp_path / "a.mp4", clip)
    assert os.listdir(tmp_path) == ["whole.mp4"]
    with disk_of(size):
        write_video(tmp_path / "a.mp4", clip)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_interrupted_write_leaves_no_debris(tmp_path):
    def interrupted():
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    write_text(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_folder_is_complete_or_absent(tmp_path):
    def interrupted():
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "x.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x.txt").write_text("whole")
    with pytest.raises(OSError), atomic_folder(tmp_path / "a"):
        pass
    with pytest.raises(FileNotFoundError, match="missing does not exist"), atomic_folder(tmp_path / "missing/b"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "x.txt"]
    assert (tmp_path / "a" / "x.txt").read_text() == "whole"


def test_contact_sheet_places_evenly_spaced_frames(generator):
    videos = [torch.randint(0, 256, (3, n, 5, 7), generator=generator, dtype=torch.uint8) for n in (9, 3)]
    sheet = np.asarray(contact_sheet(videos, columns=5, margin=1, scale=2))
    assert sheet.shape == (2 * (10 + 1) + 1, 5 * (14 + 1) + 1, 3)
    for row, steps in enumerate([(0, 2, 4, 6, 8), (0, 0, 1, 2, 2)]):
        for column, step in enumerate(steps):
            top, left = 1 + row * 11, 1 + column * 15
            cell = sheet[top : top + 10, left : left + 14]
            frame = videos[row][:, step].permute(1, 2, 0).numpy()
            assert np.array_equal(cell[::2, ::2], frame)
            assert np.array_equal(cell[1::2, 1::2], frame)


def test_contact_sheet_file_with_labels(tmp_path, generator):
    videos = [smooth_clip(generator), smooth_clip(generator)]
    write_contact_sheet(tmp_path / "a.png", videos, columns=3, labels=["one", "two"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 * (32 + 14 + 2) + 2, 3 * (48 + 2) + 2, 3)
    assert sheet[2:16].max() > 200, "the label is drawn in the band above its row"
    assert np.array_equal(sheet[16:48, 2:50], videos[0][:, 0].permute(1, 2, 0).numpy())
    before = (tmp_path / "a.png").read_bytes()
    noise = torch.randint(0, 256, (3, 2, 64, 64), generator=generator, dtype=torch.uint8)
    with disk_of(1000), pytest.raises(OSError):
        write_contact_sheet(tmp_path / "a.png", [noise])
    assert (tmp_path / "a.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_contact_sheet_names_the_bad_argument(tmp_path):
    clip = torch.zeros(3, 2, 4, 4, dtype=torch.uint8)
    for arguments, match in [
        ({"videos": []}, "videos: got none"),
        ({"videos": [clip, clip[..., :2]]}, "videos: got sizes"),
        ({"videos": [clip], "labels": ["a", "b"]}, "labels: got 2, expected 1"),
        ({"videos": [clip], "columns": 0}, "columns: got 0"),
        ({"videos": [clip], "scale": 0}, "scale: got 0"),
        ({"videos": [clip], "margin": -1}, "margin: got -1"),
    ]:
        with pytest.raises(ValueError, match=match):
            contact_sheet(**arguments)
    with pytest.raises(ValueError, match=r"path: got 'a\.jpg'"):
        write_contact_sheet(tmp_path / "a.jpg", [clip])
