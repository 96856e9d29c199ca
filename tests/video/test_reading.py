"""Ways of reading that must not change what is read: threads, far offsets, long videos, files that are replaced."""

from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hpdm.data.decode import Member, probe, read_clip
from tests.video.corpus import CASES, everything
from tests.video.corpus_h264 import h264
from tests.video.corpus_mpeg import mpeg4
from tests.video.encoding import Video, write
from tests.video.truth import sequential

OPEN = h264("open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=2")


def case_file(name, video_file):
    return video_file(next(case for case in CASES if case.name == name))


def test_threads_read_windows_of_several_files_at_once(video_file):
    paths = [case_file(name, video_file) for name in ("h264-open-gop.mp4", "packed-2b.avi", "mpeg2-open-gop.ts")]
    truths = {path: sequential(path) for path in paths}
    draw = random.Random(1)
    reads = [(path, draw.randrange(len(truths[path]) - 8)) for path in paths for _ in range(12)]
    draw.shuffle(reads)
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(lambda read: read_clip(read[0], range(read[1], read[1] + 8)).frames, reads))
    for (path, start), frames in zip(reads, clips):
        assert np.array_equal(frames, np.stack(truths[path][start : start + 8])), f"{path.name} from {start}"


@pytest.mark.parametrize("name", ["h264-open-gop.mp4", "packed-2b.avi", "h264-open-gop.mkv", "mpeg2-open-gop.mpg"])
def test_a_member_behind_four_gigabytes(video_file, tmp_path, name):
    path = case_file(name, video_file)
    truth, offset = sequential(path), 5 * 2**30 + 512
    archive = tmp_path / "large.tar"
    with archive.open("wb") as file:
        file.seek(offset)  # leaves a hole that takes no space on the disk
        file.write(path.read_bytes() + bytes(1024))
    member = Member(str(archive), path.name, offset, path.stat().st_size)
    assert probe(member).frames == len(truth)
    for start in range(0, len(truth) - 8, 5):
        frames = read_clip(member, range(start, start + 8)).frames
        assert np.array_equal(frames, np.stack(truth[start : start + 8])), start


@pytest.mark.parametrize("keep_time", [False, True], ids=["new-time", "same-time"])
@pytest.mark.parametrize("in_place", [False, True], ids=["renamed", "in-place"])
def test_a_file_that_is_replaced_by_one_of_the_same_size(tmp_path, keep_time, in_place):
    """Frames are of the file as it is now, also where its name, its size and even its time stay as they were."""
    path, other = tmp_path / "a.avi", tmp_path / "b.avi"
    write(path, Video("rawvideo", frames=16, gop=None))
    write(other, Video("rawvideo", frames=16, gop=None, seed=1))
    before, after = sequential(path), sequential(other)
    assert path.stat().st_size == other.stat().st_size
    assert not np.array_equal(before[4], after[4])
    assert np.array_equal(read_clip(path, [4, 5]).frames, np.stack(before[4:6]))
    status = path.stat()
    if in_place:
        shutil.copyfile(other, path)
    else:
        os.replace(other, path)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert np.array_equal(read_clip(path, [4, 5]).frames, np.stack(after[4:6]))


def test_a_file_that_is_replaced_by_a_longer_one(tmp_path):
    path = tmp_path / "a.mp4"
    write(path, OPEN)
    assert probe(path).frames == 40
    with pytest.raises(IndexError, match="40"):
        read_clip(path, [41])
    write(path, h264("keyint=12:bframes=0", frames=50))
    truth = sequential(path)
    assert probe(path).frames == len(truth) == 50
    assert np.array_equal(read_clip(path, [41, 49, 3]).frames, np.stack([truth[i] for i in (41, 49, 3)]))


@pytest.mark.skipif(not everything(), reason="takes seconds; HPDM_VIDEO=all")
@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("long.mp4", h264("open-gop=1:keyint=48:scenecut=0:bframes=3", frames=1500, size=(48, 64))),
        ("long.avi", mpeg4(2, frames=1500)),
        ("long.ts", h264("open-gop=1:keyint=48:scenecut=0:bframes=3", frames=1500, size=(48, 64))),
        ("one-keyframe.mkv", h264("keyint=infinite:scenecut=0:bframes=3", frames=1000, size=(48, 64))),
    ],
)
def test_a_minute_of_video(tmp_path, name, video):
    path = tmp_path / name
    write(path, video)
    truth = sequential(path)
    assert probe(path).frames == len(truth) == video.frames
    draw = random.Random(len(name))
    for start in [0, *(draw.randrange(len(truth) - 8) for _ in range(40)), len(truth) - 8]:
        frames = read_clip(path, range(start, start + 8)).frames
        assert np.array_equal(frames, np.stack(truth[start : start + 8])), start
