"""The law of training boxes, by enumeration of its Markov chain on each axis and by counts of real draws."""

import math

import numpy as np
import pytest
import torch

from hpdm import presets
from hpdm.patch.boxes import at_border, sample_boxes
from hpdm.patch.tiling import find_ancestors, level_tiling
from hpdm.sampling import SamplerOptions

PRESETS = ["tiny", "hpdm_s", "hpdm_t2v", "hpdm_t2v_1k"]


def parents(patch, ratio, parent_size):
    """``[children, parents]``: probability of each parent's offset given its child's, uniform where it contains it."""
    child, parent = np.ogrid[: ratio * parent_size - patch + 1, : parent_size - patch + 1]
    contains = (ratio * parent <= child) & (child + patch <= ratio * (parent + patch))
    return contains / contains.sum(1, keepdims=True)


def exact_law(config, axis):
    """Per level, the probability of each whole-pixel offset on one axis."""
    patch, ratio = config.patch[axis], config.ratio[axis]
    sizes = [config.level_resolution(level)[axis] for level in range(config.levels)]
    law = [np.full(sizes[-1] - patch + 1, 1 / (sizes[-1] - patch + 1))]
    for size in sizes[-2::-1]:
        law.append(law[-1] @ parents(patch, ratio, size))
    return law[::-1]


def offsets(config, boxes):
    """Offsets in pixels of each level, ``[B, L, 3]``, which must be whole."""
    sizes = torch.tensor([config.level_resolution(level) for level in range(config.levels)])
    pixels = boxes[:, :, :3].double() * sizes
    assert (pixels - pixels.round()).abs().max() < 1e-4
    return pixels.round().long()


def assert_frequencies(values, probabilities):
    """Every count is within six standard errors of the expected one (plus one, where it is small)."""
    counts, expected = np.bincount(values, minlength=len(probabilities)), len(values) * probabilities
    assert len(counts) == len(probabilities)
    assert (np.abs(counts - expected) <= 6 * np.sqrt(expected) + 1).all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("per_patch", [2, 4])
def test_every_tile_of_the_sampler_is_trained_often_enough(name, per_patch):
    """Within 10 % of a uniform density on the finest level, and at least half of it on those below."""
    config, options = presets.get(name), SamplerOptions(overlap="fhw", tiles_per_patch=per_patch)
    for axis in range(3):
        law = exact_law(config, axis)
        for level in range(1, config.levels):
            tiles = level_tiling(config, options, level).origins[:, axis].unique().numpy()
            assert {0, len(law[level]) - 1} <= set(tiles)
            density = law[level][tiles] * len(law[level])
            assert density.min() >= (0.9 if level == config.levels - 1 else 0.5)
            assert level < config.levels - 1 or density.max() <= 1.1


@pytest.mark.parametrize("name", PRESETS)
def test_a_tile_is_trained_inside_every_parent_that_the_sampler_may_choose(name):
    """As often as inside any other: the least frequent parent is as frequent as it can be."""
    config = presets.get(name)
    tilings = [level_tiling(config, SamplerOptions(overlap="fhw"), level) for level in range(config.levels)]
    for level, below in enumerate(find_ancestors(tilings)[2:], start=2):
        children, chosen = tilings[level].origins, tilings[level - 1].origins[below[level - 1]]
        for axis in range(3):
            size = config.level_resolution(level - 1)[axis]
            law = parents(config.patch[axis], config.ratio[axis], size)
            at_most = 1 / (law[children[:, axis]] > 0).sum(1)
            assert np.allclose(law[children[:, axis], chosen[:, axis]], at_most)


@pytest.mark.parametrize("name", ["tiny", "hpdm_t2v", "hpdm_t2v_1k"])
def test_draws_have_the_exact_law_on_every_level_and_axis(name, generator):
    config = presets.get(name)
    drawn = offsets(config, sample_boxes(config, 100_000, generator)).numpy()
    for axis in range(3):
        for level, law in enumerate(exact_law(config, axis)):
            assert_frequencies(drawn[:, level, axis], law)


def test_draws_are_nested_pairs_of_the_exact_law_and_axes_are_independent(generator):
    config = presets.tiny().replace(patch=(5, 15, 16), tokenizer=(1, 3, 4))
    drawn = offsets(config, sample_boxes(config, 100_000, generator)).numpy()
    for axis in range(3):
        law, size = exact_law(config, axis), config.level_resolution(1)[axis]
        pairs = law[2][:, None] * parents(config.patch[axis], 2, size)  # [children, parents]
        assert_frequencies(drawn[:, 2, axis] * pairs.shape[1] + drawn[:, 1, axis], pairs.ravel())
    f, h = (drawn[:, 1, axis] for axis in (0, 1))
    product = np.outer(exact_law(config, 0)[1], exact_law(config, 1)[1])
    assert_frequencies(f * product.shape[1] + h, product.ravel())


def test_an_axis_of_ratio_one_and_a_single_level_do_not_move(generator):
    still = offsets(presets.hpdm_t2v_1k(), sample_boxes(presets.hpdm_t2v_1k(), 50, generator))
    assert (still[..., 0] == 0).all()
    assert (still[:, -1, 1:] != 0).any()
    base = presets.tiny().with_pyramid((4, 16, 16), (4, 16, 16))
    assert torch.equal(sample_boxes(base, 2, generator), torch.tensor([[[0, 0, 0, 1, 1, 1.0]]] * 2))


def test_the_nested_law_draws_what_it_always_drew():
    """Recorded from the version that had no other law, from the same seed."""
    recorded = {
        "tiny": [[0.08746351301670074, 0.37768492102622986, 0.3041253089904785], [0.3125, 0.421875, 0.453125]],
        "hpdm_t2v_1k": [
            [0.0, 0.37768492102622986, 0.3041253089904785],
            [0.0, 0.42430579662323, 0.45273536443710327],
            [0.0, 0.4392361044883728, 0.51953125],
        ],
    }
    for name, expected in recorded.items():
        boxes = sample_boxes(presets.get(name), 2, torch.Generator().manual_seed(3), law="nested")
        assert boxes[1, 1:, :3].tolist() == expected
    boxes = sample_boxes(presets.hpdm_s(), 20_000, torch.Generator().manual_seed(0), law="nested")
    assert not at_border(boxes, presets.hpdm_s())[:, 2].any()


def test_borders_on_purpose(generator):
    """An axis is at a border with probability b + (1 - b) 2 / n, n being the number of its offsets."""
    config, rows = presets.hpdm_s(), 20_000
    boxes = sample_boxes(config, rows, generator, borders=0.25)
    room = torch.tensor(config.resolution) - torch.tensor(config.patch)
    finest = offsets(config, boxes)[:, -1]
    for axis in range(3):
        expected = 0.25 + 0.75 * 2 / (int(room[axis]) + 1)
        for border in (0, int(room[axis])):
            share = (finest[:, axis] == border).double().mean().item()
            assert share == pytest.approx(expected / 2, abs=6 * math.sqrt(expected / rows))
    on_any_axis = ((finest == 0) | (finest == room)).any(dim=1)
    assert torch.equal(at_border(boxes, config)[:, -1], on_any_axis)
    assert not at_border(boxes, config)[:, 0].any()
    wide = presets.hpdm_t2v_1k()  # cannot move in time, so the first frame is no border
    assert 0 < at_border(sample_boxes(wide, rows, generator), wide)[:, -1].double().mean() < 0.1


def test_unknown_laws_and_shares_are_refused():
    config = presets.tiny()
    with pytest.raises(ValueError, match="law: got 'middle', expected one of 'uniform', 'nested'"):
        sample_boxes(config, 1, law="middle")
    with pytest.raises(ValueError, match=r"borders: got 1.5, expected 0 to 1"):
        sample_boxes(config, 1, borders=1.5)
    with pytest.raises(ValueError, match=r"borders: got 0.5, expected 0 to 1, and 0 with law='nested'"):
        sample_boxes(config, 1, law="nested", borders=0.5)
