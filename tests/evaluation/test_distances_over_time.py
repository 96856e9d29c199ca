"""FVD and KVD along long videos: features of clips, curves against real clips and against the videos' own start."""

import numpy as np
import pytest
import torch

from hpdm.evaluation.detector import Detector
from hpdm.evaluation.feature_distances import RealFeatures, statistics_of
from hpdm.evaluation.kernel_distance import polynomial_mmd
from hpdm.evaluation.metrics import frechet_distance
from hpdm.evaluation.over_time.distances import distances_to_real, distances_to_start
from hpdm.evaluation.over_time.features import ClipFeatures
from hpdm.evaluation.real_statistics import RealStatistics
from tests.evaluation.test_evaluate import Features


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "i3d.pt"
    torch.manual_seed(0)
    torch.jit.script(Features().eval()).save(str(path))
    return Detector(path, "features")


def rng():
    return np.random.default_rng(torch.seed() % 2**32)


def real_features(detector, *draws, distances=("fvd", "kvd"), unbiased=True):
    return RealFeatures(detector, [RealStatistics(statistics_of(r), 0, r) for r in draws], distances, unbiased)


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_features_are_those_of_disjoint_clips_in_order(detector, batch):
    """Of pieces of any length, those of several videos in turn; what is left at the end is dropped."""
    videos = {n: torch.randint(256, (3, 53, 8, 8), dtype=torch.uint8) for n in (2, 0, 1)}
    lengths = {2: (1, 30, 22), 0: (16, 17, 20), 1: (53, 0, 0)}
    pieces, done = [], dict.fromkeys(videos, 0)
    for turn in range(3):
        for n in videos:
            pieces.append((n, videos[n][:, done[n] : done[n] + lengths[n][turn]]))
            done[n] += lengths[n][turn]
    features = ClipFeatures(detector, 53, batch)
    passed = list(features.watch(iter(pieces)))
    assert [n for n, _ in passed] == [n for n, _ in pieces]
    found = features.result()
    assert found.shape == (3, 3, 3)
    for n, video in videos.items():
        expected = detector(torch.stack([video[:, 16 * c : 16 * c + 16] for c in range(3)])).numpy()
        assert found[n] == pytest.approx(expected, rel=1e-4)


def test_a_video_that_ends_early_is_named(detector):
    features = ClipFeatures(detector, 48, 4)
    list(features.watch(iter([(0, torch.zeros(3, 47, 8, 8, dtype=torch.uint8))])))
    with pytest.raises(ValueError, match="frames: got 2 clips of video 0, expected 3"):
        features.result()


def test_curves_are_the_distances_of_each_clip(detector):
    source = rng()
    features = source.normal(size=(12, 4, 3)).astype(np.float32)
    draws = [source.normal(1, 2, size=(n, 3)).astype(np.float32) for n in (9, 15)]
    found = distances_to_real(features, real_features(detector, *draws))
    start = distances_to_start(features, ("fvd", "kvd"))
    for n in range(4):
        rows = features[:, n].astype(np.float64)
        for d, draw in enumerate(draws):
            fvd = frechet_distance(rows.mean(0), np.cov(rows.T), draw.astype(np.float64).mean(0),
                                   np.cov(draw.astype(np.float64).T))  # fmt: skip
            assert found["fvd"]["draws"][d][n] == pytest.approx(fvd, rel=1e-9)
            assert found["kvd"]["draws"][d][n] == polynomial_mmd(rows, draw)
        for curve in found.values():
            of_clip = [values[n] for values in curve["draws"]]
            assert curve["values"][n] == pytest.approx(np.mean(of_clip), rel=1e-12)
            assert curve["std"][n] == pytest.approx(abs(of_clip[0] - of_clip[1]) / 2, rel=1e-9, abs=1e-12)
        first = features[:, 0].astype(np.float64)
        fvd = frechet_distance(rows.mean(0), np.cov(rows.T, bias=True), first.mean(0), np.cov(first.T, bias=True))
        assert start["fvd"]["values"][n] == pytest.approx(fvd, rel=1e-9, abs=1e-12)
        assert start["kvd"]["values"][n] == polynomial_mmd(rows, first, paired=True)
    assert distances_to_real(features, real_features(detector, draws[0]))["kvd"]["std"] is None


def test_drift_shows_as_slope(detector):
    """Features whose mean moves by one per 100 frames along an axis, of videos that are otherwise unchanged."""
    still = np.random.default_rng(0).normal(size=(40, 1, 3))
    times = 16 * np.arange(6)[:, None] / 100
    drifting = still + times * np.array([1.0, 0, 0])
    for name in ("fvd", "kvd"):
        start = distances_to_start(drifting, (name,))[name]
        assert abs(start["first"]) < 1e-9
        assert start["slope"] > 0.3
        assert start["values"] == sorted(start["values"])
        assert abs(distances_to_start(np.repeat(still, 6, axis=1), (name,))[name]["slope"]) < 1e-9
        real = real_features(detector, still[:, 0], distances=(name,))
        to_real = distances_to_real(drifting, real)[name]
        assert to_real["slope"] > 0.3
        if name == "fvd":  # the covariance stays: the squared shift alone
            assert to_real["values"] == pytest.approx((times[:, 0] ** 2).tolist(), abs=1e-9)
