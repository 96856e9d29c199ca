"""Frechet distance and Inception score against closed forms and independent implementations."""

import numpy as np
import pytest
import torch

from hpdm.evaluation.metrics import FeatureStatistics, frechet_distance, inception_score


def rng():
    return np.random.default_rng(torch.seed() % 2**32)


def covariance(source, width, rank=None):
    factor = source.normal(size=(width, rank or width + 3))
    return factor @ factor.T / factor.shape[1]


def newton_schulz_root(matrix, steps=60):
    """Root of a positive definite matrix by the coupled Newton-Schulz iteration, which needs products alone."""
    size = np.linalg.norm(matrix)
    y, z, one = matrix / size, np.eye(len(matrix)), np.eye(len(matrix))
    for _ in range(steps):
        step = (3 * one - z @ y) / 2
        y, z = y @ step, step @ z
    return y * np.sqrt(size)


def test_one_dimension():
    found = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert found == pytest.approx(3**2 + (2 - 3) ** 2, rel=1e-12)


def test_diagonal_covariances():
    source = rng()
    a, b = source.uniform(0.1, 5, 20), source.uniform(0.1, 5, 20)
    mean = source.normal(size=20)
    expected = (mean**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(mean, np.diag(a), np.zeros(20), np.diag(b)) == pytest.approx(expected, rel=1e-10)


def test_commuting_covariances():
    source = rng()
    axes = np.linalg.qr(source.normal(size=(12, 12)))[0]
    a, b = source.uniform(0, 3, 12), source.uniform(0, 3, 12)
    found = frechet_distance(np.zeros(12), (axes * a) @ axes.T, np.zeros(12), (axes * b) @ axes.T)
    assert found == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-9)


def test_general_covariances_against_newton_schulz():
    source = rng()
    a, b, mean = covariance(source, 16), covariance(source, 16), source.normal(size=16)
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2)
    root = newton_schulz_root(a)
    expected = (mean**2).sum() + np.trace(a + b - 2 * newton_schulz_root(root @ b @ root))
    assert frechet_distance(mean, a, np.zeros(16), b) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_identical_sets_are_at_no_distance(rank):
    source = rng()
    c, mean = covariance(source, 40, rank) * 1e4, source.normal(size=40)
    assert frechet_distance(mean, c, mean, c) <= 1e-12 * np.trace(c) * len(c)


def test_singular_covariances_of_few_vectors():
    """Subspaces at right angles share nothing: the distance is the sum of the traces; in a common plane it is exact."""
    source = rng()
    axes = np.linalg.qr(source.normal(size=(50, 50)))[0]
    a, b = (axes[:, :5] * 3) @ axes[:, :5].T, (axes[:, 5:9] * 2) @ axes[:, 5:9].T
    zero = np.zeros(50)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(15 + 8, rel=1e-12)
    c = (axes[:, :5] * 12) @ axes[:, :5].T
    assert frechet_distance(zero, a, zero, c) == pytest.approx(5 * (np.sqrt(12) - np.sqrt(3)) ** 2, rel=1e-12)


def test_distance_is_symmetric_and_grows_with_the_shift():
    source = rng()
    a, b, mean = covariance(source, 9, 4), covariance(source, 9), np.ones(9)
    zero = np.zeros(9)
    assert frechet_distance(zero, a, zero, b) == pytest.approx(frechet_distance(zero, b, zero, a), rel=1e-10)
    near, far = (frechet_distance(zero, a, shift * mean, b) for shift in (1, 2))
    assert far - near == pytest.approx(27, rel=1e-10)


def test_streamed_statistics_are_those_of_the_whole_and_lose_no_digits_far_from_zero():
    source = rng()
    rows = source.normal(size=(101, 6)) + 1e7
    stats = FeatureStatistics()
    for part in np.split(rows, [1, 2, 40, 90]):
        stats.update(part)
    assert stats.count == 101
    assert stats.mean == pytest.approx(rows.mean(axis=0), rel=1e-15)
    assert np.allclose(stats.covariance(), np.cov(rows, rowvar=False), rtol=1e-7, atol=1e-8)
    assert np.allclose(stats.covariance(unbiased=False), np.cov(rows, rowvar=False, bias=True), rtol=1e-7, atol=1e-8)
    naive = rows.T @ rows / 101 - np.outer(stats.mean, stats.mean)
    assert np.abs(naive - stats.covariance(unbiased=False)).max() > 1e-3  # what this avoids
    again = FeatureStatistics.of(stats.count, stats.mean, stats.covariance(unbiased=False))
    assert np.allclose(again.covariance(), stats.covariance(), rtol=1e-14)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (np.zeros(3), r"got shape \[3\]"),
        (np.zeros((2, 4)), r"got shape \[2, 4\], expected \[B, 3\]"),
        (np.zeros((0, 3)), "not empty"),
        (np.full((2, 3), np.nan), "got NaN"),
    ],
)
def test_bad_features_are_named(rows, match):
    stats = FeatureStatistics()
    stats.update(np.ones((2, 3)))
    with pytest.raises(ValueError, match=f"features: .*{match}|features: {match}"):
        stats.update(rows)
    assert stats.count == 2


def test_one_vector_has_no_covariance():
    stats = FeatureStatistics()
    stats.update(np.ones((1, 3)))
    with pytest.raises(ValueError, match="got 1 vector"):
        stats.covariance()


@pytest.mark.parametrize(
    ("index", "value", "match"),
    [
        (1, np.eye(3), r"covariance_a: got shape \[3, 3\], expected \[2, 2\]"),
        (2, np.array([1.0, np.inf]), "mean_b: got NaN or infinity"),
        (3, np.diag([1.0, -1.0]), "covariance_b: smallest eigenvalue -1"),
        (3, np.array([[1.0, 0.5], [0.0, 1.0]]), "covariance_b: .*symmetric"),
    ],
)
def test_bad_gaussians_are_named(index, value, match):
    arguments = [np.zeros(2), np.eye(2), np.zeros(2), np.eye(2)]
    arguments[index] = value
    with pytest.raises(ValueError, match=match):
        frechet_distance(*arguments)


def test_inception_score_of_sure_and_of_clueless_classifiers():
    sure = np.eye(5)[np.arange(40) % 5]
    assert inception_score(sure, splits=4) == pytest.approx((5, 0))
    assert inception_score(np.full((20, 7), 1 / 7), splits=2) == pytest.approx((1, 0))
    one_class = np.eye(5)[np.zeros(10, dtype=int)]
    assert inception_score(one_class, splits=1) == pytest.approx((1, 0))


def test_inception_score_against_the_entropies():
    """KL to the marginal is H(y) - H(y|x), a different formula for the same number."""
    rows = rng().dirichlet(np.ones(6) * 0.4, size=60)
    entropy = lambda p: -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1)
    parts = [np.exp(entropy(part.mean(axis=0)) - entropy(part).mean()) for part in np.split(rows, 3)]
    assert inception_score(rows, splits=3) == pytest.approx((np.mean(parts), np.std(parts)), rel=1e-9)
    order = rows.copy()
    np.random.RandomState(42).shuffle(order)
    assert inception_score(rows, 3, shuffle=42) == pytest.approx(inception_score(order, 3), rel=1e-12)
    assert inception_score(rows, 3, shuffle=42) != pytest.approx(inception_score(rows, 3), rel=1e-9)


@pytest.mark.parametrize(
    ("rows", "splits", "match"),
    [
        (np.ones(3), 1, "probabilities: got shape"),
        (np.ones((4, 3)), 1, "sum to 1"),
        (np.array([[1.5, -0.5]]), 1, "without negative"),
        (np.full((4, 2), np.nan), 1, "probabilities"),
        (np.eye(3), 4, r"splits: got 4, expected 1\.\.3"),
        (np.eye(3), 0, "splits: got 0"),
    ],
)
def test_bad_probabilities_are_named(rows, splits, match):
    with pytest.raises(ValueError, match=match):
        inception_score(rows, splits)
