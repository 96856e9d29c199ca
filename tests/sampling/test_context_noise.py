"""Finished levels noised again before they become context."""

import pytest
import torch

from hpdm.noise import level_noise
from hpdm.patch.sampler import Sampler
from hpdm.process import DATA_STD, gamma
from hpdm.sampling import SamplerOptions
from tests.small import random_model, small_config


def make_sampler(model, **options):
    return Sampler(model, SamplerOptions(**{"steps": 3, "overlap": "w", "tile_batch": 8} | options))


def crop(video, box, patch):
    """The tile of ``video [B, C, F, H, W]`` at a box on whole pixels."""
    first = [round(float(o) * n) for o, n in zip(box[:3], video.shape[2:], strict=True)]
    f, h, w = (slice(o, o + r) for o, r in zip(first, patch, strict=True))
    return video[:, :, f, h, w]


@pytest.mark.parametrize("time", [0.0, 0.08, 0.3])
def test_features_are_of_the_noised_video(time, monkeypatch):
    """``sqrt(g) b x + sqrt(1 - g) e`` at every tile, with one ``e`` for the whole video, and that time."""
    model = random_model(small_config(ratio=(1, 2, 2)))
    sampler, seen = make_sampler(model, context_noise=time), []
    run = model.level_features

    def spy(x, level, boxes, t, *rest):
        seen.extend((level, *row) for row in zip(x, boxes, t, strict=True))
        return run(x, level, boxes, t, *rest)

    monkeypatch.setattr(model, "level_features", spy)
    videos = sampler([11], torch.tensor([1]))
    assert sorted(level for level, *_ in seen) == [0] + [1] * 6
    g = float(gamma(torch.tensor(time, dtype=torch.float64)))
    for level, x, box, t in seen:
        signal = model.config.signal_scale(level)
        noise = level_noise([11], level, videos[level].shape[1:], "context")
        noised = g**0.5 * signal * videos[level] + (1 - g) ** 0.5 * noise
        expected = crop(noised, box, model.config.patch)[0] / (g * (signal * DATA_STD) ** 2 + 1 - g) ** 0.5
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
        assert float(t) == pytest.approx(time)


def test_the_noise_is_of_its_own():
    """Not that from which the level was sampled, nor another level's or video's."""
    draws = [
        level_noise([seed], level, (1000,), purpose)
        for seed in (0, 1) for level in (0, 1) for purpose in ("sampling", "context")
    ]  # fmt: skip
    correlation = torch.corrcoef(torch.cat(draws))
    assert (correlation - torch.eye(len(draws))).abs().max() < 0.2
    assert torch.equal(level_noise([1, 0], 1, (3,), "context")[1:], level_noise([0], 1, (3,), "context"))


@pytest.mark.parametrize("changes", [{}, {"fusion": "shallow"}])
def test_caches_and_resumed_calls_agree(changes):
    model = random_model(small_config(ratio=(1, 2, 2), **changes))

    def run(finished=(), **options):
        options = {"context_noise": 0.1, "guidance": 1.5} | options
        return make_sampler(model, **options)([1, 2], torch.tensor([0, 1]), finished=finished)

    videos, clean = run(), run(context_noise=0.0)
    assert torch.equal(videos[0], clean[0])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(videos[1:], clean[1:], strict=True))
    for again in (run(cache="cpu"), run(finished=videos[:1]), run(finished=videos[:2])):
        assert all(torch.equal(a, b) for a, b in zip(again, videos, strict=True))
    for a, b in zip(run(cache="off"), videos, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
