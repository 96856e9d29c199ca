"""Levels that agree with the finished level below."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from hpdm.patch.consistency import SMOOTH_ROUNDS, Consistency
from hpdm.patch.sampler import Sampler
from hpdm.sampling import SamplerOptions
from tests.sampling.test_detail import LinearGaussian
from tests.small import random_model, small_config

RATIOS = [(2, 2, 2), (1, 2, 2)]


def averages(video, ratio):
    """Block means by an explicit reshape."""
    b, c, *size = video.shape
    blocks = [n for s, r in zip(size, ratio, strict=True) for n in (s // r, r)]
    return video.reshape(b, c, *blocks).mean(dim=(3, 5, 7))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (-0.7, 1.7), (1.3, -0.4)])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_difference_of_the_averages_is_taken_away(generator, ratio, alpha, beta, share):
    """Of the prediction alone, whatever the solver combined it with."""
    below = torch.randn(2, 3, 2, 3, 5, generator=generator, dtype=torch.float64)
    size = [n * r for n, r in zip(below.shape[2:], ratio, strict=True)]
    base, y = (torch.randn(2, 3, *size, generator=generator, dtype=torch.float64) for _ in range(2))
    combined = Consistency(below, ratio, share).correct_(alpha * base + beta * y, base, alpha, beta)
    corrected = (combined - alpha * base) / beta
    expected = averages(y, ratio).lerp(below, share)
    torch.testing.assert_close(averages(corrected, ratio), expected, rtol=1e-12, atol=1e-12)
    again = Consistency(averages(corrected, ratio), ratio).correct_(corrected.clone(), base, 0.0, 1.0)
    torch.testing.assert_close(again, corrected, rtol=1e-12, atol=1e-12)


def test_a_smooth_difference_is_corrected_without_edges():
    """Steps between the pixels of a corrected ramp are even, where blocks of one value would have none and double."""
    ramp = torch.linspace(-1, 1, 16).reshape(1, 1, 1, 1, 16).expand(1, 1, 4, 16, 16)
    nothing = torch.zeros(1, 1, 8, 32, 32)
    video = Consistency(ramp, (2, 2, 2)).correct_(nothing.clone(), nothing, 0.0, 1.0)
    steps = video[..., 4:-4].diff(dim=-1) / (2 / 15 / 2)
    assert (steps - 1).abs().max() < 0.05


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("solver", ["2m", "heun", "ddim", "edm"])
@pytest.mark.parametrize("overlap", ["none", "fhw"])
def test_sampled_levels_are_averages_of_those_above(ratio, solver, overlap):
    config = small_config(ratio=ratio)
    options = SamplerOptions(steps=64, later_solver=solver, overlap=overlap, tile_batch=1000, consistency=1.0)
    levels = Sampler(LinearGaussian(config), options)([4, 5])
    for below, level in pairwise(levels):
        inside = averages((level.abs() == 1).float(), ratio) == 0  # a finished level is clamped to the range of pixels
        assert inside.float().mean() > 0.9
        torch.testing.assert_close(averages(level, ratio)[inside], below[inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rounds", "tolerance"), [(0, 1e-3), (SMOOTH_ROUNDS, 0.1)])
def test_what_averages_do_not_see_is_left_to_the_network(monkeypatch, rounds, tolerance):
    """Exactly, but for what the smooth corrections put there."""
    monkeypatch.setattr("hpdm.patch.consistency.SMOOTH_ROUNDS", rounds)
    config = small_config(levels=2, levels_per_block=(1, 2))

    def detail(share):
        options = SamplerOptions(steps=64, overlap="hw", tile_batch=1000, consistency=share)
        level = Sampler(LinearGaussian(config), options)([4, 5])[1]
        return (level - F.interpolate(averages(level, config.ratio), size=level.shape[2:])).std(dim=(0, 2, 3, 4))

    torch.testing.assert_close(detail(1.0) / detail(0.0), torch.ones(3), rtol=0, atol=tolerance)


def test_without_it_the_levels_differ_and_nothing_is_computed(monkeypatch):
    model, calls = random_model(small_config()), []
    correct = Consistency.correct_
    monkeypatch.setattr(Consistency, "correct_", lambda *a: calls.append(1) or correct(*a))

    def sample(share):
        options = SamplerOptions(steps=4, overlap="hw", tile_batch=64, consistency=share)
        return Sampler(model, options)([1], torch.tensor([0]))

    plain = sample(0.0)
    assert not calls
    half, whole = (
        (averages(levels[1], model.config.ratio) - levels[0]).abs().mean() for levels in (sample(0.5), sample(1.0))
    )
    assert calls
    assert (averages(plain[1], model.config.ratio) - plain[0]).abs().mean() > half > whole


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match=r"consistency: got .*, expected a share in \[0, 1\]"):
        SamplerOptions(consistency=share)
