"""The diffusion's identities."""

import math
from itertools import pairwise

import pytest
import torch

from hpdm.process import T_MAX, add_noise, denoise, gamma, network_input, sampling_times, time_of_sigma


def test_v_and_the_noised_patch_give_back_the_clean_one(generator):
    x, noise = (torch.randn(4, 3, 3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    signal = torch.tensor([1.0, 0.7, 0.49], dtype=torch.float64)
    noised, v = add_noise(x, noise, t, signal)
    back = denoise(noised.flatten(0, 1), v.flatten(0, 1), t.flatten()).unflatten(0, (4, 3))
    torch.testing.assert_close(back, x * signal.reshape(1, 3, 1, 1, 1, 1))


def test_noise_and_signal_share_the_variance(generator):
    x, noise = torch.randn(2, 200, 1, 1, 100, 10, generator=generator).unbind(0)
    x = x * 0.5
    t = torch.rand(1, 200, generator=generator)
    signal = torch.full((200,), 0.6)
    noised, _ = add_noise(x[None], noise[None], t, signal)
    # 1,000 values each: a standard error of 2.2 % on the standard deviation.
    std = network_input(noised, t, signal).flatten(2).std(dim=2)
    assert (std - 1).abs().max() < 0.12


def test_the_schedule_runs_from_signal_to_noise():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    g = gamma(t)
    assert g[0] == 1
    assert g[-1] < 1e-30
    assert (g.diff() < 0).all()
    inner = t[1:-1]
    sigma = ((1 - gamma(inner)) / gamma(inner)).sqrt()
    torch.testing.assert_close(time_of_sigma(sigma), inner)


def test_sampling_times():
    times = sampling_times(4)
    assert times[0] == T_MAX
    assert times[-1] == 0
    assert len(times) == 5
    assert all(math.isclose(a - b, T_MAX / 4) for a, b in pairwise(times))
    with pytest.raises(ValueError, match="steps: got 0"):
        sampling_times(0)
