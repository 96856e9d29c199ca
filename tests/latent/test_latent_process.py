"""Noise schedules, predictions, and the solvers DDIM and DDPM on them, against the papers' formulas."""

import math
from itertools import pairwise

import pytest
import torch

from hpdm import process
from hpdm.objective import Objective, draw_noise, loss_weight
from hpdm.process import COSINE, SCHEDULES, Betas, clean_of, mixture, noise_of, prediction_target, v_of
from hpdm.sampling import SamplerOptions
from hpdm.solvers import Solver, noise_levels

LINEAR = SCHEDULES["linear"]


def alpha_bars(first=0.0015, last=0.0155, steps=1000):
    """Latent diffusion's chain, written out."""
    betas = [
        (first**0.5 + (last**0.5 - first**0.5) * n / (steps - 1)) ** 2 for n in range(steps)
    ]  # fmt: skip
    bars, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        bars.append(product)
    return betas, bars


# ---- schedules ----


def test_the_cosine_schedule_is_what_it_was(generator):
    t = torch.rand(50, generator=generator)
    sigma = torch.rand(50, generator=generator) * 100
    assert torch.equal(COSINE.gamma(t), torch.cos(t * (math.pi / 2)).square())
    assert torch.equal(COSINE.time_of_sigma(sigma), torch.atan(sigma) * (2 / math.pi))
    assert COSINE.sigma_max == process.SIGMA_MAX
    times = [process.T_MAX * (1 - i / 7) for i in range(7)] + [0.0]
    assert noise_levels("time", 7, 0.01, 7.0) == tuple(math.tan(math.pi / 2 * t) for t in times)
    g, x, noise = process.gamma(t), *torch.randn(2, 50, generator=generator).unbind(0)
    noised, v = process.add_noise(x[:, None], noise[:, None], t[:, None], torch.ones(1))
    assert torch.equal(noised[:, 0], g.sqrt() * x + (1 - g).sqrt() * noise)
    assert torch.equal(v[:, 0], g.sqrt() * noise - (1 - g).sqrt() * x)
    assert torch.equal(process.denoise(noised[:, 0], v[:, 0], t), g.sqrt() * noised[:, 0] - (1 - g).sqrt() * v[:, 0])


def test_the_linear_schedule_is_latent_diffusions():
    betas, bars = alpha_bars()
    torch.testing.assert_close(LINEAR.betas, torch.tensor(betas, dtype=torch.float64), rtol=1e-12, atol=0)
    times = torch.tensor([LINEAR.time_of_step(n) for n in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(LINEAR.gamma(times), torch.tensor(bars, dtype=torch.float64), rtol=1e-10, atol=0)
    assert LINEAR.gamma(torch.zeros(1)) == 1
    assert LINEAR.sigma_max == pytest.approx(math.sqrt((1 - bars[-1]) / bars[-1]))
    other = SCHEDULES["stable-diffusion"]
    assert float(other.gamma(torch.ones(1, dtype=torch.float64))) == pytest.approx(alpha_bars(0.00085, 0.012)[1][-1])


@pytest.mark.parametrize(
    ("step", "share", "signal", "std", "sigma"),
    [
        (50, 0.9182, 0.958, 0.29, 0.299), (100, 0.8288, 0.910, 0.414, 0.454), (249, 0.5374, 0.733, 0.680, 0.928),
        (999, 0.0007, 0.026, 1.000, 38.66),
    ],
)  # fmt: skip
def test_known_frames_have_the_published_noise(step, share, signal, std, sigma):
    """At the steps 50, 100 and 249 of the paper's perturbation, and at the end of the chain."""
    g = float(LINEAR.gamma(torch.tensor(LINEAR.time_of_step(step), dtype=torch.float64)))
    assert g == pytest.approx(share, abs=5e-5)
    assert (math.sqrt(g), math.sqrt(1 - g)) == pytest.approx((signal, std), abs=5e-3)
    assert LINEAR.sigma(LINEAR.time_of_step(step)) == pytest.approx(sigma, rel=2e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_and_noise_level_are_inverse(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0, schedule.t_max, 997, dtype=torch.float64)
    g = schedule.gamma(t)
    assert (g.diff() < 0).all()
    torch.testing.assert_close(schedule.time_of_sigma(((1 - g) / g).sqrt()), t, rtol=0, atol=1e-9)
    assert schedule.gamma(t.float()).dtype is torch.float32
    assert schedule.time_of_sigma(torch.tensor(1e9)) == pytest.approx(1, abs=1e-6)


def test_bad_chains_are_named():
    with pytest.raises(ValueError, match=r"^first, last: got 0.1, 0.01, expected 0 < first <= last < 1"):
        Betas(0.1, 0.01)
    with pytest.raises(ValueError, match=r"^steps: got 1, expected at least 2"):
        Betas(steps=1)
    with pytest.raises(ValueError, match=r"^step: got 1000, expected one of 0..999"):
        LINEAR.time_of_step(1000)


# ---- predictions ----


@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_predictions_mean_the_same(prediction, generator):
    y, noise = torch.randn(2, 300, generator=generator, dtype=torch.float64).unbind(0)
    for g in (torch.rand(300, generator=generator, dtype=torch.float64) * 0.998 + 0.001, 0.3):
        noised = mixture(y, noise, g)
        said = prediction_target(prediction, y, noise, g)
        torch.testing.assert_close(clean_of(said, noised, g, prediction), y)
        torch.testing.assert_close(noise_of(said, noised, g, prediction), noise)
        torch.testing.assert_close(v_of(said, noised, g, prediction), prediction_target("v", y, noise, g))


def test_min_snr_weights_the_clean_video_whatever_is_predicted(generator):
    y, noise, said = torch.randn(3, 200, generator=generator, dtype=torch.float64).unbind(0)
    t = torch.rand(200, generator=generator, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    g = LINEAR.gamma(t)
    wanted = (g / (1 - g)).clamp(max=5) * (clean_of(said, mixture(y, noise, g), g) - y).square()
    for prediction in ("v", "eps"):
        told = noise_of(said, mixture(y, noise, g)[None], g)[0] if prediction == "eps" else said
        error = (told - prediction_target(prediction, y, noise, g)).square()
        torch.testing.assert_close(loss_weight("min-snr", t, one, LINEAR, prediction) * error, wanted)


def test_noise_of_rows_does_not_depend_on_which_they_are():
    def drawn(rows):
        return draw_noise(6, (2, 3), torch.Generator().manual_seed(1), rows)

    assert torch.equal(drawn(range(2, 5)), drawn(range(6))[2:5])
    assert drawn(None).shape == (6, 2, 3)


# ---- solvers ----


class Noise:
    """Independent standard normal numbers, exactly: variables are the coefficients of a sum of them and a constant."""

    def __init__(self, count):
        self.drawn, self.count = 0, count

    def __call__(self):
        self.drawn += 1
        return self._only(self.drawn, 1.0)

    def constant(self, value):
        return self._only(0, value)

    def _only(self, place, value):
        sums = torch.zeros(self.count + 1, dtype=torch.float64)
        sums[place] = value
        return sums


def distribution(x):
    """Mean and variance."""
    return float(x[0]), float(x[1:].square().sum())


def marginals(solver, mean, variance):
    """Mean and variance of ``x`` before every step, and at the end, for Gaussian data and the best denoiser."""
    noise, seen = Noise(solver.steps + 1), []

    def update(x, sigma, base, alpha, beta):
        seen.append(distribution(x))
        y = noise.constant(mean) + (x - noise.constant(mean)) * (variance / (variance + sigma**2))
        return alpha * base + beta * y

    end = distribution(solver.solve(update, noise))
    return [*seen, end], noise.drawn


def ddpm(mean, variance, eta=1.0, stride=1):
    """The same from the formulas for ``x~``: Song et al. 2021, eq. 12 and 16; with eta = 1 Ho et al. 2020, eq. 7."""
    _, bars = alpha_bars()
    bars = bars[stride - 1 :: stride]
    m, v, path = 0.0, 1.0, []
    for n in reversed(range(len(bars))):
        bar, before = bars[n], bars[n - 1] if n else 1.0
        path.append((m / bar**0.5, v / bar))
        added = eta**2 * (1 - before) / (1 - bar) * (1 - bar / before)
        gain = bar**0.5 * variance / (bar * variance + 1 - bar)  # of E[y | x~]
        to_noise = (1 - before - added) ** 0.5 / (1 - bar) ** 0.5
        of_y, of_x = before**0.5 - to_noise * bar**0.5, to_noise
        v = (of_x + of_y * gain) ** 2 * v + added
        m = of_x * m + of_y * (mean + gain * (m - bar**0.5 * mean))
    return [*path, (m, v)]


def ancestral_step(n, betas, bars):
    """Coefficients of x~ and y, and the variance, of one step of Ho et al. 2020, eq. 6 and 7."""
    before = bars[n - 1] if n else 1.0
    of_y = before**0.5 * betas[n] / (1 - bars[n])
    of_x = (1 - betas[n]) ** 0.5 * (1 - before) / (1 - bars[n])
    return of_x, of_y, (1 - before) / (1 - bars[n]) * betas[n]


def test_eta_1_on_every_step_of_the_chain_is_ddpm():
    """Mean and variance of every step, given x~ and y."""
    solver = Solver(noise_levels("time", 1000, 0.01, 7.0, LINEAR), "euler", eta=1.0)
    betas, bars = alpha_bars()
    noise = Noise(1001)
    steps = iter(reversed(range(1000)))

    def update(x, sigma, base, alpha, beta):
        n = next(steps)
        before = bars[n - 1] if n else 1.0
        of_x, of_y, variance = ancestral_step(n, betas, bars)
        added = solver._ancestral(sigma, math.sqrt((1 - before) / before))[1]
        # x~ = sqrt(g) x before, and after the step.
        assert alpha * math.sqrt(before / bars[n]) == pytest.approx(of_x, rel=1e-7, abs=1e-9)
        assert beta * math.sqrt(before) == pytest.approx(of_y, rel=1e-6)
        assert added**2 * before == pytest.approx(variance, rel=1e-6, abs=1e-12)
        return alpha * base + beta * noise.constant(0.3)

    assert distribution(solver.solve(update, noise))[0] == pytest.approx(0.3)
    assert noise.drawn == 1000  # the start and all steps but the last
    assert next(steps, None) is None


@pytest.mark.parametrize(("eta", "stride"), [(0.0, 20), (0.5, 20), (1.0, 20), (1.0, 5), (1.0, 1)])
def test_the_whole_path_has_the_closed_forms_marginals(eta, stride):
    solver = Solver(noise_levels("time", 1000 // stride, 0.01, 7.0, LINEAR), "euler", eta=eta)
    for mean, variance in ((0.0, 1.0), (0.7, 0.04)):
        path, drawn = marginals(solver, mean, variance)
        for (m, v), (m_formula, v_formula) in zip(path, ddpm(mean, variance, eta, stride), strict=True):
            assert m == pytest.approx(m_formula, rel=1e-6, abs=1e-6)
            assert v == pytest.approx(v_formula, rel=1e-6)
        assert drawn == (solver.steps if eta else 1)
    # Of a single point every member of the family has the forward chain's marginals: N(y, sigma^2) at every step.
    path, _ = marginals(solver, 0.7, 0.0)
    for (m, v), sigma in zip(path[1:], solver.sigmas[1:], strict=True):
        assert v == pytest.approx(sigma**2, rel=2e-3, abs=1e-12)
        assert m == pytest.approx(0.7, abs=0.03 * sigma + 1e-9)


def test_ddpm_of_the_whole_chain_gives_the_data_back():
    solver = Solver(noise_levels("time", 1000, 0.01, 7.0, LINEAR), "euler", eta=1.0)
    for mean, variance in ((0.0, 1.0), (0.7, 0.25)):
        m, v = marginals(solver, mean, variance)[0][-1]
        assert m == pytest.approx(mean, abs=0.02)
        assert v == pytest.approx(variance, rel=0.03)  # 0.243 for 0.25: the posterior's variance is the least


@pytest.mark.parametrize("spacing", ["edm", "time"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_eta_0_is_the_first_order_solver(name, spacing, generator):
    """The same bits, and the formula of DDIM."""
    schedule = SCHEDULES[name]
    sigmas = noise_levels(spacing, 12, 0.01, 7.0, schedule)
    start = torch.randn(50, generator=generator, dtype=torch.float64)

    def update(x, sigma, base, alpha, beta):
        return alpha * base + beta * (x / (1 + sigma**2)).tanh()

    found = Solver(sigmas, "euler", eta=0.0).solve(update, lambda: start)
    assert torch.equal(found, Solver(sigmas, "euler").solve(update, lambda: start))
    noised = start * math.hypot(1.0, sigmas[0]) / math.sqrt(1 + sigmas[0] ** 2)  # x~
    for sigma, following in pairwise(sigmas):
        g, g_next = 1 / (1 + sigma**2), 1 / (1 + following**2)
        y = (noised / g**0.5 / (1 + sigma**2)).tanh()
        noised = g_next**0.5 * y + (1 - g_next) ** 0.5 * (noised - g**0.5 * y) / (1 - g) ** 0.5
    torch.testing.assert_close(found, noised)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "euler", "eta": 1.5}, r"eta: got 1.5, expected a share in \[0, 1\]"),
        ({"method": "heun", "eta": 1.0}, "eta: got 1.0, expected 0 for solver 'heun' with churn 0.0"),
        ({"method": "euler", "eta": 0.5, "churn": 3.0}, "eta: got 0.5, expected 0 for solver 'euler' with churn 3.0"),
    ],
)
def test_bad_etas_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Solver((3.0, 2.0, 1.0, 0.0), **arguments)


def test_options_name_the_solver_of_a_schedule():
    options = SamplerOptions(steps=50, solver="ddpm", spacing="time")
    assert options.level_solver(0, schedule=LINEAR) == Solver(
        noise_levels("time", 50, 0.01, 7.0, LINEAR), "euler", eta=1.0, churn_range=options.churn_range
    )
    assert SamplerOptions(churn=30.0).level_solver(0, schedule=LINEAR)._raised(LINEAR.sigma_max) == LINEAR.sigma_max
    assert SamplerOptions(solver="ddim").level_solver(0).eta == 0


def test_perturbed_frames_have_the_same_noise_on_every_schedule():
    """The default of the cosine schedule is the paper's s_max = 249 on its own."""
    sigma = COSINE.sigma(Objective().known_t_max)
    assert float(LINEAR.time_of_sigma(torch.tensor(sigma, dtype=torch.float64))) == pytest.approx(0.25, abs=1e-3)
