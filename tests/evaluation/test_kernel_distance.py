"""The kernel distance against double loops, closed forms and numbers worked out by hand; it has no bias."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hpdm.evaluation.kernel_distance import polynomial_mmd


def rng():
    return np.random.default_rng(torch.seed() % 2**32)


def by_loops(a, b, paired=False):
    """The definition, one pair at a time, and a bound of the terms that may cancel: that of absolute features."""

    def value(x, y):
        of_a = [kernel(x[i], x[j]) for i, j in itertools.permutations(range(len(x)), 2)]
        of_b = [kernel(y[i], y[j]) for i, j in itertools.permutations(range(len(y)), 2)]
        cross = [kernel(p, q) for i, p in enumerate(x) for j, q in enumerate(y) if not paired or i != j]
        return [math.fsum(values) / len(values) for values in (of_a, of_b, cross)]

    def kernel(p, q):
        return (math.fsum(float(s) * float(t) for s, t in zip(p, q)) / len(p) + 1) ** 3

    (of_a, of_b, cross), bound = value(a, b), value(np.abs(a), np.abs(b))
    return of_a + of_b - 2 * cross, bound[0] + bound[1] + 2 * bound[2]


@pytest.mark.parametrize("shape", [(2, 2, 1), (7, 5, 3), (13, 21, 9), (3, 30, 17)])
@pytest.mark.parametrize("block", [1, 4, 1024])
def test_it_is_the_definition(shape, block):
    source, (n, m, width) = rng(), shape
    a, b = source.normal(0.5, 2, (n, width)), source.normal(-0.3, 1, (m, width))
    expected, terms = by_loops(a, b)
    assert abs(polynomial_mmd(a, b, block=block) - expected) <= 1e-12 * terms
    assert abs(polynomial_mmd(b, a, block=block) - expected) <= 1e-12 * terms
    c = source.normal(1, 3, (n, width))
    expected, terms = by_loops(a, c, paired=True)
    assert abs(polynomial_mmd(a, c, paired=True, block=block) - expected) <= 1e-12 * terms


def test_float32_features_are_summed_in_fp64():
    source = rng()
    a, b = (source.normal(30, 1, (n, 11)).astype(np.float32) for n in (40, 33))
    expected, terms = by_loops(a, b)
    assert abs(polynomial_mmd(a, b) - expected) <= 1e-12 * terms


def test_degree_gamma_and_constant_are_those_of_sklearn():
    """``polynomial_kernel`` there: degree 3, gamma 1 / W, coef0 1. Of W = 2, by hand."""
    a, b = np.array([[1, 2], [0, 1]]), np.array([[2, 0], [1, 1], [-1, 3]])
    within_a = Fraction(2, 2) + 1
    within_b = [Fraction(2, 2) + 1, Fraction(-2, 2) + 1, Fraction(2, 2) + 1]
    cross = [Fraction(dot, 2) + 1 for dot in (2, 3, 5, 0, 1, 3)]
    expected = within_a**3 + sum(k**3 for k in within_b) / 3 - 2 * sum(k**3 for k in cross) / 6
    assert expected == Fraction(-31, 2)
    assert polynomial_mmd(a, b) == pytest.approx(-15.5, rel=1e-14)


def test_closed_forms():
    source = rng()
    x, y = source.normal(size=(2, 6))
    k = lambda p, q: (p @ q / 6 + 1) ** 3
    of_points = polynomial_mmd(np.tile(x, (5, 1)), np.tile(y, (8, 1)), block=3)
    scale = (x @ x / 6 + 1) ** 3 + (y @ y / 6 + 1) ** 3
    assert abs(of_points - (k(x, x) + k(y, y) - 2 * k(x, y))) <= 1e-12 * scale
    # Of one feature, (x y + 1)^3 = 1 + 3 x y + 3 x^2 y^2 + x^3 y^3: the distance follows from sums of powers.
    a, b = source.normal(size=50), source.normal(0.5, 1.5, size=37)
    powers = {1: 3, 2: 3, 3: 1}
    within = lambda v: (
        sum(c * ((v**p).sum() ** 2 - (v ** (2 * p)).sum()) for p, c in powers.items()) / (len(v) * (len(v) - 1))
    )
    between = sum(c * (a**p).mean() * (b**p).mean() for p, c in powers.items())
    terms = sum(c * (np.abs(v) ** p).mean() ** 2 for v in (a, b) for p, c in powers.items())
    assert abs(polynomial_mmd(a[:, None], b[:, None]) - (within(a) + within(b) - 2 * between)) <= 1e-11 * terms


def test_a_set_is_at_no_distance_from_itself_when_paired():
    a = rng().normal(size=(31, 5))
    assert abs(polynomial_mmd(a, a.copy(), paired=True, block=7)) <= 1e-12 * by_loops(a, a)[1]


def test_it_has_no_bias():
    """Means over redraws from one distribution are zero within their errors, of the biased estimate they are not."""
    source = np.random.default_rng(0)
    values, biased, dependent = [], [], []
    for _ in range(3000):
        a, b = source.normal(0.3, 1, (9, 4)), source.normal(0.3, 1, (14, 4))
        values.append(polynomial_mmd(a, b))
        kernel = lambda x, y: ((x @ y.T / 4 + 1) ** 3).mean()
        biased.append(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
        c = 0.3 + 0.8 * (a - 0.3) + 0.6 * source.normal(size=a.shape)  # of the same distribution, and depends on a
        dependent.append((polynomial_mmd(a, c, paired=True), polynomial_mmd(a, c)))
    off = lambda v: np.mean(v, axis=0) / (np.std(v, axis=0) / math.sqrt(len(v)))
    assert abs(off(values)) < 4
    assert off(biased) > 10
    paired, unpaired = off(dependent)
    assert abs(paired) < 4
    assert unpaired < -10


@pytest.mark.parametrize(
    ("a", "b", "changes", "match"),
    [
        (np.ones(3), np.ones((2, 3)), {}, r"a: got shape \[3\], expected \[N, W\] with at least 2 rows"),
        (np.ones((2, 3)), np.ones((1, 3)), {}, r"b: got shape \[1, 3\]"),
        (np.ones((2, 0)), np.ones((2, 0)), {}, r"a: got shape \[2, 0\]"),
        (np.ones((2, 3)), np.ones((2, 4)), {}, r"b: got shape \[2, 4\], expected \[M, 3\] as of a"),
        (np.ones((2, 3)), np.full((2, 3), np.inf), {}, "b: got NaN or infinity"),
        (np.ones((2, 3)), np.ones((4, 3)), {"paired": True}, "b: got 4 rows, expected 2 as of a"),
        (np.ones((2, 3)), np.ones((2, 3)), {"block": 0}, "block: got 0"),
    ],
)
def test_bad_features_are_named(a, b, changes, match):
    with pytest.raises(ValueError, match=match):
        polynomial_mmd(a, b, **changes)
