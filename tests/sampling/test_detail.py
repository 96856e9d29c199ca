"""The real sampler, tiles and all, with the exact denoiser of linear-Gaussian data in place of the network.

Each color channel has its own standard deviation. Without churn the sampler then multiplies its initial noise, voxel by
voxel, by the numbers that the closed recursion gives.
"""

import math

import pytest
import torch

from hpdm import HPDM
from hpdm.noise import level_noise
from hpdm.patch.sampler import Sampler
from hpdm.process import DATA_STD, gamma
from hpdm.sampling import SamplerOptions
from tests.sampling.test_solvers import recursion
from tests.small import small_config

STDS = (0.2, 0.1, 0.05)
"""In pixels of [-1, 1]."""


class LinearGaussian(HPDM):
    """Predicts the v of the best denoiser of white video with these standard deviations; counts its calls."""

    def __init__(self, config):
        super().__init__(config, "torch")
        self.eval()
        self.calls = dict.fromkeys(range(config.levels), 0)

    def level_features(self, x, level, *_):
        nothing = torch.zeros(x.shape[0], self.config.tokens, self.config.width)
        return dict.fromkeys(self.fusing_blocks(level + 1), nothing)

    def forward_level(self, x, level, boxes, t, context, *_):
        self.calls[level] += 1
        signal = self.config.signal_scale(level)
        g = gamma(t.double()).reshape(-1, 1, 1, 1, 1)
        variance = (torch.tensor(STDS, dtype=torch.float64).reshape(-1, 1, 1, 1) * signal) ** 2
        noised = x * (g * (signal * DATA_STD) ** 2 + 1 - g).sqrt()
        y = g.sqrt() * variance * noised / (g * variance + 1 - g)
        return ((g.sqrt() * noised - y) / (1 - g).sqrt()).float()


FOUR_LEVELS = {"ratio": (1, 2, 2), "levels": 4, "levels_per_block": (1, 2, 3, 4)}


@pytest.mark.parametrize(("changes", "overlap"), [({}, "hw"), ({}, "none"), (FOUR_LEVELS, "none")])
@pytest.mark.parametrize(("steps", "tolerance"), [(128, 0.05), (64, 0.1)])
def test_default_options_keep_detail_on_every_later_level(changes, overlap, steps, tolerance):
    """At the calls of the old default, and at half of them."""
    config = small_config(patch=(1, 4, 4), tokenizer=(1, 2, 2), **changes)
    model = LinearGaussian(config)
    videos = Sampler(model, SamplerOptions(steps=steps, overlap=overlap, tile_batch=10_000))([4, 5])
    for level in range(1, config.levels):
        noise = level_noise([4, 5], level, videos[level].shape[1:])
        for channel, std in enumerate(STDS):
            amplitude = videos[level][:, channel].std() / (std * noise[:, channel].std())
            assert abs(amplitude - 1) < tolerance, (level, std)
    assert model.calls == {n: round(steps * 0.5**n) if n else 2 * steps - 1 for n in range(config.levels)}


@pytest.mark.parametrize("steps", [128, 32])
def test_default_options_keep_detail_on_level_0(steps):
    config = small_config(patch=(4, 16, 16), levels=1, levels_per_block=(1, 1))
    (video,) = Sampler(LinearGaussian(config), SamplerOptions(steps=steps, tile_batch=10_000))(range(20))
    amplitudes = video.std(dim=(0, 2, 3, 4)) / torch.tensor(STDS)
    assert (amplitudes - 1).abs().max() < 0.05


@pytest.mark.parametrize("overlap", ["none", "hw"])
@pytest.mark.parametrize("spacing", ["edm", "time"])
@pytest.mark.parametrize(("name", "method"), [("2m", "2m"), ("heun", "heun"), ("ddim", "euler")])
def test_the_sampler_is_the_closed_recursion(name, method, spacing, overlap):
    options = SamplerOptions(
        steps=21, steps_decay=0.7, solver=name, later_solver=name, spacing=spacing, overlap=overlap, tile_batch=100,
        sigma_min=0.004, rho=-6.0, clip=False,
    )  # fmt: skip
    config = small_config(input_scale_decay=0.6)
    sampler = Sampler(LinearGaussian(config), options)
    for level, video in enumerate(sampler([8])):
        sigmas = sampler.solvers[level].sigmas
        assert len(sigmas) == 1 + round(21 * 0.7**level)
        noise = level_noise([8], level, video.shape[1:])
        signal = config.signal_scale(level)
        for channel, std in enumerate(STDS):
            expected = recursion(method, sigmas, signal * std) * std * noise[:, channel]
            torch.testing.assert_close(video[:, channel], expected.clamp(-1, 1), rtol=2e-4, atol=2e-5)
        if spacing == "edm":
            assert math.isclose(sigmas[-2], 0.004 * signal)
