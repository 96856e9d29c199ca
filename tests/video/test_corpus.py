"""Every frame and every window of every file is what ``ffmpeg -i FILE`` shows, or is refused by name."""

from __future__ import annotations

import tarfile
from collections import Counter

import numpy as np
import pytest

from hpdm.data.decode import Member
from tests.video.cases import Case
from tests.video.corpus import CASES, HARDEST, by_kind, chosen, everything, seed
from tests.video.examine import RESULT, Findings, counts, examine
from tests.video.truth import FFMPEG, by_command, sequential

CHOSEN = chosen()
IN_TARS = [case for case in CHOSEN if case.name in HARDEST][:: 1 if everything() else 4]
TOLERANCE = 8.0
"""Mean difference, of 255, up to which two versions of FFmpeg show the same frame.

They interpolate color differently, above all of interlaced video. Neighbors in the corpus differ by more than 30.
"""


def _check(case: Case, found: Findings) -> None:
    faults = found.faults(case)
    print(f"HPDM_VIDEO_SEED={seed()}")
    listed = "\n".join([f"{fault} ({times} times)" for fault, times in Counter(faults).items()][:40])
    assert not faults, f"{case.name}: {len(faults)} faults in {found.reads} reads of {found.frames} frames:\n{listed}"


def test_the_corpus_is_large_and_its_names_are_unique():
    assert len(CASES) >= 200
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(by_kind()) >= 30
    assert {case.name for case in CASES} >= HARDEST


@pytest.fixture(scope="module", params=CHOSEN, ids=[case.name for case in CHOSEN])
def case(request):
    """Every case in turn: the tests of a case follow each other, so that its file is made and decoded once."""
    return request.param


@pytest.fixture(scope="module")
def path(case, video_file):
    return video_file(case)


@pytest.fixture(scope="module")
def truth(case, path):
    """The frames of the case's file; none where it must be refused."""
    frames = [] if case.refusal else sequential(path)
    assert frames or case.refusal, "the sequential decode shows nothing, so the case must expect a refusal"
    return frames


def test_every_frame_and_window_is_right(case, path, truth, record_property):
    found = examine(case, path, truth)
    record_property(RESULT, counts(case, found))
    _check(case, found)


@pytest.mark.skipif(FFMPEG is None, reason="the ffmpeg program is not installed")
def test_the_ffmpeg_program_shows_the_same(case, path, truth):
    if case.refusal:
        pytest.skip("a file that must be refused")
    shown = by_command(path, truth[0].shape[:2])
    differences = [float(np.abs(a.astype(int) - b).mean()) for a, b in zip(shown, truth)]
    same = len(shown) == len(truth) and max(differences) < TOLERANCE
    if case.by_command and not same:
        pytest.xfail(f"known to differ between versions of FFmpeg: {case.by_command}")
    assert same, f"{len(shown)} frames for {len(truth)}, differences {[round(d, 1) for d in differences]}"


@pytest.mark.parametrize("member", IN_TARS, ids=[case.name for case in IN_TARS])
def test_a_member_of_a_tar_has_the_same_frames(member, video_file, tmp_path):
    path = video_file(member)
    archive, other = tmp_path / "shard.tar", tmp_path / "other.bin"
    other.write_bytes(bytes(range(256)) * 3)
    with tarfile.open(archive, "w") as tar:
        for file, name in ((other, "before.bin"), (path, member.name), (other, "behind.bin")):
            tar.add(file, name)
    with tarfile.open(archive) as tar:
        entry = tar.getmember(member.name)
    source = Member(str(archive), member.name, entry.offset_data, entry.size)
    _check(member, examine(member, source, sequential(path)))
