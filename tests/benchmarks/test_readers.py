"""The benchmark of reading: its videos show their frames' numbers, and its readers say what they cost."""

import dataclasses
import itertools

import numpy as np
import pytest

from benchmarks import videos
from benchmarks.readers import Reader

SMALL = dataclasses.replace(videos.XVID, height=96, width=160, frames=20)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return videos.write(SMALL, tmp_path_factory.mktemp("videos"))


def test_numbers_are_drawn_into_frames():
    frames = list(videos.pictures(96, 160, 40))
    assert [videos.number_shown(frame) for frame in frames] == list(range(40))
    changes = [np.abs(one.astype(int) - other).mean() for one, other in itertools.pairwise(frames)]
    assert min(changes) > 1


def test_a_reader_measures_itself_and_its_decoding_process(video, tmp_path):
    reader = Reader("hpdm", {"decoder": "auto"}, tmp_path)
    try:
        assert reader.shown(video, [3, 4, 5, 19]) == [3, 4, 5, 19]
        sample, memory = reader.sample(video, list(range(20))), reader.memory()
    finally:
        reader.close()
    assert 0 < sample.cpu_seconds < 60
    assert 0 < sample.seconds < 60
    assert 0 < memory.reader < 2**30
    assert 2**24 < memory.decoder < 2**30, "an interpreter with a codec"
    assert list(tmp_path.rglob("*.json")), "scans are kept where the benchmark says"


def test_a_reader_that_only_decodes_shows_nothing(video, tmp_path):
    reader = Reader("pyav", {"convert": False}, tmp_path)
    try:
        assert reader.shown(video, [3, 4]) is None
        assert reader.memory().decoder == 0
    finally:
        reader.close()


def test_a_reader_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(KeyError, match="nosuch"):
        Reader("nosuch", {}, tmp_path)
