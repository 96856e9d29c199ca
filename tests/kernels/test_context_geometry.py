"""Footprints: how many tokens of a source a patch touches, whatever its offset."""

import itertools
import math
import random

import pytest

from hpdm_kernels.context.geometry import footprint_size, needed_footprint
from hpdm_kernels.testing import random_boxes


def test_footprint_size_is_the_most_that_is_touched():
    draw = random.Random(0)
    for n, m in itertools.product((1, 2, 3, 7, 8, 16), repeat=2):
        for scale in (1.0, 0.5, 0.25, 0.7, 1 / 3):
            most = 0
            for offset in [0.0, 1 - scale, *(draw.random() * (1 - scale) for _ in range(200))]:
                u = [(offset + scale * (i + 0.5) / n) * m - 0.5 for i in (0, n - 1)]
                low, high = (min(max(v, 0.0), m - 1.0) for v in u)
                most = max(most, math.ceil(high) - math.floor(low) + 1)
            assert most <= footprint_size(scale, n, m) <= m
            # Never more than one token to spare, which offsets on half tokens need.
            assert footprint_size(scale, n, m) <= most + 1


def test_footprint_size_of_the_papers_pyramids():
    assert [footprint_size(scale, 16, 16) for scale in (1.0, 0.5, 0.25)] == [16, 10, 6]


@pytest.mark.parametrize(("scale", "n", "m"), [(0.0, 4, 4), (1.5, 4, 4), (0.5, 0, 4), (0.5, 4, 0)])
def test_footprint_size_rejects(scale, n, m):
    with pytest.raises(ValueError, match="relative_scale" if n * m else "n, n_source"):
        footprint_size(scale, n, m)


def test_boxes_of_a_pyramid_fit_the_footprint_of_their_scale(generator):
    grid = (16, 7, 12)
    for level in range(1, 4):
        parent = random_boxes(64, (0.5, 0.5, 1.0), generator)
        scale = (0.5**level, 0.5**level, 0.5 ** (level - 1))
        box = random_boxes(64, [s * p for s, p in zip(scale, (0.5, 0.5, 1.0))], generator, parent)
        needed = needed_footprint(box.numpy(), parent.numpy(), grid, grid, slack=4 * 2**-23)
        assert all(p <= footprint_size(s, n, n) for p, s, n in zip(needed, scale, grid))
