"""Guidance by level and by noise level: the plain formula, and no second copy where the weight is 1."""

import math

import pytest
import torch

import hpdm.patch.sampler
import hpdm.patch.tile_network
from hpdm import HPDM
from hpdm.patch.sampler import Sampler
from hpdm.patch.sampling_cost import sampling_plan
from hpdm.sampling import SamplerOptions
from tests.small import random_model, small_config


def flat_config(**changes):
    """Few tiles: 1, 6 and 28 with overlap "w"."""
    return small_config(ratio=(1, 2, 2), **changes)


def sample(model, finished=(), seeds=(3, 4), labels=(1, 2), **options):
    defaults = {"steps": 5, "overlap": "w", "tile_batch": 24, "churn": 0.0}
    sampler = Sampler(model, SamplerOptions(**defaults | options))
    return sampler(seeds, torch.tensor(labels), finished=finished)


class PlainlyGuided(HPDM):
    """On level 0: ``v_u + w (v_c - v_u)`` for noise levels in an interval, from two calls of a model; else ``v_c``."""

    def __init__(self, model, weight, interval):
        super().__init__(model.config, "torch")
        self.model, self.weight, self.interval = [model], weight, interval

    def forward_level(self, x, level, boxes, t, context, labels=None, *rest):
        (model,) = self.model
        v = model.forward_level(x, level, boxes, t, context, labels)
        sigma = math.tan(math.pi / 2 * float(t[0]))
        if level > 0 or not self.interval[0] <= sigma <= self.interval[1]:
            return v
        nothing = torch.full_like(labels, self.config.classes)
        unconditional = model.forward_level(x, level, boxes, t, context, nothing)
        return unconditional + self.weight * (v - unconditional)


def test_guidance_in_an_interval_is_the_plain_formula():
    model = random_model(flat_config())
    interval = (0.1, 20.0)
    plain = sample(PlainlyGuided(model, 2.5, interval))[0]
    torch.testing.assert_close(
        sample(model, guidance=2.5, guidance_interval=interval, later_guidance=1.0)[0], plain, rtol=0, atol=1e-4
    )
    assert (sample(model, guidance=2.5)[0] - plain).abs().max() > 1e-2
    assert (sample(model)[0] - plain).abs().max() > 1e-2


@pytest.mark.parametrize("cache", ["gpu", "cpu", "off"])
@pytest.mark.parametrize("changes", [{}, {"fusion": "shallow"}])
def test_later_levels_without_guidance_are_those_of_an_unguided_call(cache, changes):
    model = random_model(flat_config(**changes))
    videos = sample(model, guidance=3.0, later_guidance=1.0, cache=cache)
    assert torch.equal(videos[0], sample(model, guidance=3.0)[0])
    for level, expected in enumerate(sample(model, finished=videos[:1], cache=cache)):
        torch.testing.assert_close(videos[level], expected, rtol=0, atol=2e-5)
    assert not torch.allclose(videos[1], sample(model, finished=videos[:1], guidance=3.0)[1], atol=1e-3)


@pytest.mark.parametrize("cache", ["gpu", "cpu", "off"])
@pytest.mark.parametrize("changes", [{}, {"self_conditioning": 0.9}])
def test_an_interval_gives_what_two_copies_everywhere_give(cache, changes, monkeypatch):
    """With a weight of 1 outside of the interval, as the formula says; all levels, one of them guided from within."""
    model = random_model(flat_config(**changes))
    options = {"guidance": 2.0, "later_guidance": 1.7, "guidance_interval": (0.05, 8.0), "cache": cache}
    if changes:  # latents of the unconditional rows start where guidance does
        assert all(torch.isfinite(video).all() for video in sample(model, **options))
        return
    videos = sample(model, **options)
    for module in (hpdm.patch.sampler, hpdm.patch.tile_network):
        monkeypatch.setattr(module, "copies_of", lambda weight: 2)
    for video, expected in zip(videos, sample(model, **options), strict=True):
        torch.testing.assert_close(video, expected, rtol=0, atol=5e-5)


def test_an_interval_is_relative_to_the_signal_of_a_level():
    options = SamplerOptions(guidance=3.0, later_guidance=2.0, guidance_interval=(0.5, 4.0))
    assert [options.guidance_at(0, sigma, 1.0) for sigma in (0.4, 0.5, 4.0, 4.1)] == [1.0, 3.0, 3.0, 1.0]
    assert [options.guidance_at(2, sigma, 0.5) for sigma in (0.2, 0.25, 2.0, 2.1)] == [1.0, 2.0, 2.0, 1.0]
    everywhere = SamplerOptions(guidance=3.0)
    assert everywhere.guidance_at(1, 1e-6) == everywhere.guidance_at(0, 100.0) == 3.0


@pytest.mark.parametrize("cache", ["gpu", "off"])
@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 2.0, "later_guidance": 1.0},
        {"guidance": 1.0, "later_guidance": 2.0},
        {"guidance": 2.0, "guidance_interval": (0.05, 8.0)},
        {"guidance": 2.0, "later_guidance": 1.5, "guidance_interval": (0.3, 3.0)},
    ],
)
def test_rows_and_calls_are_those_of_the_plan(options, cache):
    """Of one video; and a second copy only where guidance acts."""
    model = random_model(flat_config())
    rows, calls = [0, 0, 0], [0, 0, 0]
    clean = [0, 0, 0]
    forward, features = model.forward_level, model.level_features

    def counted(x, level, *rest):
        rows[level] += len(x)
        calls[level] += 1
        assert len(x) <= 12
        return forward(x, level, *rest)

    def counted_features(x, level, *rest):
        clean[level] += len(x)
        return features(x, level, *rest)

    model.forward_level, model.level_features = counted, counted_features
    progress = []
    sampler = Sampler(model, SamplerOptions(steps=6, overlap="hw", tile_batch=12, cache=cache, **options))
    sampler([3], torch.tensor([1]), progress=lambda *call: progress.append(call))
    plans = sampling_plan(model.config, sampler.options)
    assert sum(rows) + sum(clean) == sum(plan.patches for plan in plans)
    for level, plan in enumerate(plans):
        signal = model.config.signal_scale(level)
        sigmas = sampler.solvers[level].prediction_sigmas()
        guided = sum(sampler.options.guidance_at(level, sigma, signal) != 1 for sigma in sigmas)
        assert rows[level] == plan.tiles * (len(sigmas) + guided)
        batches = -(-plan.tiles // 6) * guided + -(-plan.tiles // 12) * (len(sigmas) - guided)
        assert calls[level] == batches  # twice as many tiles in a call without the second copy
        if cache == "gpu":
            later_is_guided = options.get("later_guidance", options["guidance"]) != 1
            assert clean[level] == (plan.tiles * (1 + later_is_guided) if level < 2 else 0)
            done = [call for call in progress if call[0] == level]
            assert len(done) == done[-1][2] == plan.network_calls


def test_guided_levels_need_conditions():
    model = random_model(flat_config())
    with pytest.raises(ValueError, match=r"^later_guidance: got 2.0 without labels or text, expected 1"):
        Sampler(model, SamplerOptions(later_guidance=2.0))([0])
    with pytest.raises(ValueError, match=r"^guidance: got 2.0 without labels or text, expected 1"):
        Sampler(model, SamplerOptions(guidance=2.0, later_guidance=1.0))([0])
