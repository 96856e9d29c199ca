"""The corpus: every kind of video file that people have, each small, made by the tests, and proved to be of its kind.

``HPDM_VIDEO=all`` (``make test-video``) reads all of it; else the hardest kinds and a draw that changes with every run.
"""

from __future__ import annotations

import os
import random
from collections import Counter

from tests.video import (
    corpus_codecs,
    corpus_colors,
    corpus_command,
    corpus_cuts,
    corpus_damage,
    corpus_edits,
    corpus_flags,
    corpus_geometry,
    corpus_h264,
    corpus_images,
    corpus_mpeg,
    corpus_streams,
    corpus_times,
)
from tests.video.cases import Case

CASES: tuple[Case, ...] = (
    *corpus_h264.CASES,
    *corpus_mpeg.CASES,
    *corpus_codecs.CASES,
    *corpus_colors.CASES,
    *corpus_command.CASES,
    *corpus_times.CASES,
    *corpus_cuts.CASES,
    *corpus_edits.CASES,
    *corpus_damage.CASES,
    *corpus_flags.CASES,
    *corpus_geometry.CASES,
    *corpus_streams.CASES,
    *corpus_images.CASES,
)
HARDEST = frozenset(
    (
        "h264-open-gop.mp4",
        "h264-open-gop.mkv",
        "h264-intra-refresh.mp4",
        "hevc-open-gop.mp4",
        "packed-1b.avi",
        "packed-2b.avi",
        "mpeg4-repeats.avi",
        "mpeg2-open-gop.mpg",
        "wmv2.wmv",
        "vp8-hidden.webm",
        "delays-vary.gif",
        "times-repeated.mkv",
        "times-unsorted.mkv",
        "times-of-decoding.mp4",
        "times-wrap.ts",
        "joined-h264.ts",
        "elementary-h264-open-gop.mp4",
        "cut-1-h264-open-gop.ts",
        "cut-1-hevc-open-gop.ts",
        "begins-at-cra.mp4",
        "copied-open-gop.mp4",
        "edit-trims-both.mp4",
        "damage-flipped.mp4",
        "sizes-change-h264.ts",
        "matrix-antitransposed.mp4",
        "streams-three.mkv",
    )
)
"""Cases of every run: each stands for a way in which a decoder that seeks goes wrong."""
DRAWN = 6
"""Cases drawn at random beside them."""


def seed() -> int:
    """The seed of the draw: ``HPDM_VIDEO_SEED``, or one of this run, the same in all of its processes."""
    if given := os.environ.get("HPDM_VIDEO_SEED"):
        return int(given)
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return int(run[:7], 16) if run else _SEED


_SEED = random.SystemRandom().randrange(2**28)


def everything() -> bool:
    """Whether this run reads the whole corpus."""
    return os.environ.get("HPDM_VIDEO") == "all"


def chosen() -> list[Case]:
    """The cases of this run, in the order of the corpus."""
    if everything():
        return list(CASES)
    drawn = set(random.Random(seed()).sample([case.name for case in CASES if case.name not in HARDEST], DRAWN))
    return [case for case in CASES if case.name in HARDEST | drawn]


def by_kind() -> Counter[str]:
    """How many files there are of each kind."""
    return Counter(case.kind for case in CASES)
