"""Solvers and spacings against closed forms.

Of linear-Gaussian data, where every solver is a recursion of numbers, and of mixtures of Gaussians, whose quantiles are
known.
"""

import math
import random
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from hpdm import presets
from hpdm.process import SIGMA_MAX, T_MAX, edm_sigmas
from hpdm.sampling import SamplerOptions
from hpdm.solvers import Solver, noise_levels

OLD = {"spacing": "time", "later_solver": "ddim"}
DETAIL = (0.2, 0.1, 0.05)
"""Standard deviations of components in pixels of [-1, 1]."""


def solve(solver, denoise, x):
    """The solver from the noise ``x`` with a denoiser ``denoise(x, sigma)``; also the noise levels of its calls."""
    seen, draws = [], iter([x])
    generator = torch.Generator().manual_seed(1)

    def update(x, sigma, base, alpha, beta):
        seen.append(sigma)
        return alpha * base + beta * denoise(x, sigma)

    def noise():
        for start in draws:
            return start
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)

    return solver.solve(update, noise), seen


def gain(solver, std):
    """Amplitude that a deterministic solver gives to a Gaussian component of standard deviation ``std``, relative."""
    one = torch.ones(1, dtype=torch.float64)
    return float(solve(solver, lambda x, sigma: x * std**2 / (std**2 + sigma**2), one)[0]) / std


def recursion(method, sigmas, std):
    """The same in plain numbers, from the papers' formulas: ``lambda = -log sigma``, ``dx/dsigma = (x - y) / s``."""
    x, old, last = math.hypot(1, sigmas[0]), None, None
    for s, following in pairwise(sigmas):
        y = x * std**2 / (std**2 + s**2)
        if method == "2m":
            blend = y
            if following > 0:
                h = math.log(s) - math.log(following)
                if old is not None:
                    r = (math.log(last) - math.log(s)) / h
                    blend = (1 + 1 / (2 * r)) * y - 1 / (2 * r) * old  # Lu et al. 2022b, Algorithm 2
                x = following / s * x - math.expm1(-h) * blend
            else:
                x = y
            old, last = y, s
            continue
        slope = (x - y) / s
        predicted = x + (following - s) * slope
        if method == "heun" and following > 0:
            slope = (slope + (predicted - predicted * std**2 / (std**2 + following**2)) / following) / 2
            predicted = x + (following - s) * slope
        x = predicted
    return x / std


@pytest.mark.parametrize("method", ["euler", "heun", "2m"])
@pytest.mark.parametrize("spacing", ["edm", "time"])
def test_solvers_are_the_papers_recursions(method, spacing):
    """For random numbers of steps, signal scales, exponents and components."""
    draw = random.Random(f"{method} {spacing}")
    for _ in range(20):
        signal = draw.uniform(0.2, 1.5)
        sigmas = noise_levels(spacing, draw.randint(2, 70), draw.uniform(1e-3, 0.02) * signal, draw.choice([-10, 7, 3]))
        std = signal * 10 ** draw.uniform(-2, 0)
        assert gain(Solver(sigmas, method), std) == pytest.approx(recursion(method, sigmas, std), rel=1e-9)


@pytest.mark.parametrize("name", ["hpdm_s", "hpdm_t2v", "tiny"])
@pytest.mark.parametrize(("steps", "tolerance"), [(128, 0.05), (64, 0.1)])
def test_detail_survives_on_every_later_level(name, steps, tolerance):
    """With default options at the calls of first order at even times, and at half of them."""
    config = presets.get(name)
    for level in range(1, config.levels):
        scale = config.signal_scale(level)
        solver = SamplerOptions(steps=steps).level_solver(level, scale)
        assert solver.predictions == round(steps * 0.5**level)
        gains = [gain(solver, scale * std) for std in DETAIL]
        assert max(abs(g - 1) for g in gains) < tolerance
        old = SamplerOptions(steps=steps, **OLD).level_solver(level, scale)
        assert all(gain(old, scale * std) < g for std, g in zip(DETAIL, gains))
        # The same in pixels whatever the signal scale.
        other = SamplerOptions(steps=steps).level_solver(level, 3 * scale)
        assert [gain(other, 3 * scale * std) for std in DETAIL] == pytest.approx(gains, abs=0.02)


def test_old_settings_are_those_of_before():
    """The first version: amplitudes .82, .66 and .44 on level 2, with 32 steps of first order at times even in t."""
    solver = SamplerOptions(**OLD).level_solver(2, 0.49)
    assert [round(gain(solver, 0.49 * std), 2) for std in DETAIL] == [0.82, 0.66, 0.44]


@pytest.mark.parametrize(("steps", "churn"), [(128, 0.0), (128, 10.0), (128, 40.0), (32, 0.0), (32, 10.0), (32, 40.0)])
def test_detail_survives_on_level_0(steps, churn):
    """With Heun's method and churn, from the spread of many samples."""
    solver = SamplerOptions(steps=steps, churn=churn).level_solver(0)
    generator = torch.Generator().manual_seed(steps)
    stds = torch.tensor(DETAIL, dtype=torch.float64)[:, None]
    x = torch.randn(3, 20_000, generator=generator, dtype=torch.float64)
    y, _ = solve(solver, lambda x, sigma: x * stds**2 / (stds**2 + sigma**2), x)
    assert ((y.std(dim=1) / stds[:, 0]) - 1).abs().max() < 0.05


def mixture(weights, means, stds):
    """``(denoise(x, sigma), quantile, std)`` of a mixture of Gaussians in one dimension; its signal scale is 1."""
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))

    def denoise(x, sigma):
        variance = s**2 + sigma**2  # [k]
        d = x[..., None] - m  # [..., k]
        share = (w.log() - d.square() / (2 * variance) - variance.log() / 2).softmax(dim=-1)
        return (share * (m + s**2 / variance * d)).sum(dim=-1)

    def quantiles(u):
        x = torch.linspace(float((m - 6 * s).min()), float((m + 6 * s).max()), 20_001, dtype=torch.float64)
        cdf = (w * torch.special.ndtr((x[:, None] - m) / s)).sum(dim=1)
        return x[torch.searchsorted(cdf, u).clamp(max=20_000)]

    mean = (w * m).sum()
    return denoise, quantiles, float((w * (s**2 + (m - mean) ** 2)).sum().sqrt())


MIXTURES = {
    "two points": ([0.5, 0.5], [-0.6, 0.6], [0.02, 0.02]),
    "skewed": ([0.9, 0.1], [-0.1, 0.7], [0.02, 0.05]),
    "three": ([0.3, 0.4, 0.3], [-0.7, 0.0, 0.6], [0.05, 0.1, 0.03]),
    "heavy tails": ([0.7, 0.3], [0.0, 0.0], [0.01, 0.2]),
    "two near points": ([0.5, 0.5], [-0.05, 0.05], [0.01, 0.01]),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("steps", "bound"), [(32, 0.02), (16, 0.03), (8, 0.12)])
def test_distributions_that_are_not_gaussian(name, steps, bound):
    """Wasserstein distance of samples and data over the data's deviation; the map is monotone, so of quantiles."""
    denoise, quantiles, std = mixture(*MIXTURES[name])
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    noise = torch.tensor([NormalDist().inv_cdf(v) for v in u.tolist()], dtype=torch.float64)

    def distance(**changes):
        solver = SamplerOptions(steps=2 * steps, **changes).level_solver(1)
        y = solve(solver, denoise, noise)[0].sort().values
        return float((y - quantiles(u)).abs().mean()) / std

    assert distance() < bound
    assert distance() < distance(**OLD)


def test_the_multistep_method_is_of_second_order():
    """Twice the steps, a quarter of the error, apart from the start and the last step, whose errors are known."""
    std, sigma_min = 0.1, 0.005
    # An exact solution grows as hypot(std, sigma); the step to 0 multiplies it by std^2 / (std^2 + sigma_min^2).
    exact = math.hypot(1, SIGMA_MAX) / math.hypot(std, SIGMA_MAX) * std / math.hypot(std, sigma_min)
    errors = [abs(gain(Solver(noise_levels("edm", n, sigma_min, 1000), "2m"), std) - exact) for n in (100, 200, 400)]
    assert all(3.5 < a / b < 4.6 for a, b in pairwise(errors))


@pytest.mark.parametrize("name", ["edm", "heun", "ddim", "ddpm", "2m"])
def test_predictions_are_counted_before_they_are_made(name):
    solver = SamplerOptions(steps=9, solver=name, churn=30.0).level_solver(0)
    x = torch.randn(4, dtype=torch.float64)
    before = x.clone()
    _, seen = solve(solver, lambda x, sigma: x / (1 + sigma**2), x)
    assert seen == solver.prediction_sigmas()
    assert len(seen) == solver.predictions == {"edm": 17, "heun": 17, "ddim": 9, "ddpm": 9, "2m": 9}[name]
    assert torch.equal(x, before)


def test_edm_spacing_is_equation_5():
    sigmas = edm_sigmas(5, 0.002, 7.0)
    assert sigmas[0] == SIGMA_MAX == math.tan(math.pi / 2 * T_MAX)
    assert sigmas[-2:] == [pytest.approx(0.002), 0.0]
    roots = [s ** (1 / 7) for s in sigmas[:-1]]
    assert all(a - b == pytest.approx(roots[0] - roots[1]) for a, b in pairwise(roots))
    ratios = [math.log(a / b) for a, b in pairwise(edm_sigmas(9, 0.002, -10.0)[:-1])]
    assert ratios == sorted(ratios, reverse=True)  # the smallest steps at the clean end
    assert edm_sigmas(1, 0.002, 7.0) == [SIGMA_MAX, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spacing": "cosine"}, "spacing: got 'cosine', expected one of 'edm', 'time'"),
        ({"rho": 0.0}, "rho: got 0.0, expected a finite number other than 0"),
        ({"sigma_min": 0.0}, "sigma_min: got 0.0, expected a noise level between 0 and 127.3"),
        ({"solver": "2m", "steps": 1}, "steps: got 1, expected at least 2 for solver '2m'"),
        ({"later_solver": "unipc"}, "later_solver: got 'unipc', expected one of 'edm', 'heun', 'ddim', 'ddpm', '2m'"),
        ({"guidance_interval": (2.0, 1.0)}, r"guidance_interval: got \(2.0, 1.0\), expected 0 <= lowest < highest"),
        ({"context_noise": 1.0}, r"context_noise: got 1.0, expected a time in \[0, 1\)"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplerOptions(**options)


def test_bad_solvers_are_named():
    with pytest.raises(ValueError, match=r"^steps: got 1, expected at least 2 for solver '2m'"):
        Solver((1.0, 0.0), "2m")
    with pytest.raises(ValueError, match=r"^sigmas: got \(1.0, 2.0, 0.0\), expected falling"):
        Solver((1.0, 2.0, 0.0), "euler")
    with pytest.raises(ValueError, match=r"^churn: got 3.0, expected 0 for solver '2m'"):
        Solver((2.0, 1.0, 0.0), "2m", 3.0)
    assert SamplerOptions(steps=2).level_solver(5).steps == 2  # a decayed number is never too few
