"""The corpus: every kind of video file that people have, each small, made by the tests, and proved to be of its kind.

``HPDM_VIDEO=all`` (``make test-video``) reads all of it; else the hardest kinds and a draw that changes with every run.
"""

from __future__ import annotations

import os
import random
from collections import Counter

from tests.video import corpus_codecs, corpus_cuts, corpus_h264, corpus_images, corpus_layout, corpus_mpeg, corpus_times
from tests.video.cases import Case

CASES: tuple[Case, ...] = (
    *corpus_h264.CASES,
    *corpus_mpeg.CASES,
    *corpus_codecs.CASES,
    *corpus_times.CASES,
    *corpus_cuts.CASES,
    *corpus_layout.CASES,
    *corpus_images.CASES,
)
DRAWN = 8
"""Cases drawn at random beside the hard ones."""


def seed() -> int:
    """The seed of the draw: ``HPDM_VIDEO_SEED``, or one of this run, the same in all of its processes."""
    if given := os.environ.get("HPDM_VIDEO_SEED"):
        return int(given)
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return int(run[:7], 16) if run else _SEED


_SEED = random.SystemRandom().randrange(2**28)


def chosen() -> list[Case]:
    """The cases of this run, in the order of the corpus."""
    if os.environ.get("HPDM_VIDEO") == "all":
        return list(CASES)
    drawn = set(random.Random(seed()).sample([case.name for case in CASES if not case.hard], DRAWN))
    return [case for case in CASES if case.hard or case.name in drawn]


def by_kind() -> Counter[str]:
    """How many files there are of each kind."""
    return Counter(case.kind for case in CASES)
