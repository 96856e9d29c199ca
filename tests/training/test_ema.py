"""Moving averages of the weights: their laws, their names, and where they start."""

import copy
import math

import pytest
import torch
from torch import nn

from hpdm.training.ema import (
    EMA,
    ConstantDecay,
    PowerLaw,
    folder_names,
    folder_of_weights,
    gamma_of_width,
    laws,
)


def weighting(width, updates):
    """The weight of each state in the average, by i^gamma (Karras et al. 2024, eq. 1), in closed form."""
    gamma = gamma_of_width(width)
    share = [(i / updates) ** gamma for i in range(1, updates + 1)]
    return gamma, [value / sum(share) for value in share]


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_widths_have_the_exponents_of_the_paper(width, gamma):
    """Section 3.1 gives these two pairs."""
    assert gamma_of_width(width) == pytest.approx(gamma, abs=0.005)


def test_a_width_is_the_standard_deviation_of_the_weighting(generator):
    width = 0.03 + 0.2 * float(torch.rand((), generator=generator))
    _, weights = weighting(width, 4000)
    mean = sum(w * i / 4000 for i, w in enumerate(weights, start=1))
    variance = sum(w * (i / 4000 - mean) ** 2 for i, w in enumerate(weights, start=1))
    assert math.sqrt(variance) == pytest.approx(width, rel=0.01)


def test_the_widest_is_the_plain_mean(generator):
    model = nn.Linear(3, 2)
    ema, states = EMA(model, PowerLaw(1 / math.sqrt(12))), []
    for _ in range(9):
        states.append(moved(model, generator))
        ema.update(model)
    torch.testing.assert_close(ema.shadow["weight"], torch.stack(states).mean(0))


def test_power_averages_weight_states_as_their_law_says(generator):
    """The recursion is exact for the product of its own factors, and close to i^gamma once updates are many."""
    model = nn.Linear(3, 2)
    ema, states = EMA(model, PowerLaw(0.05), PowerLaw(0.12)), []
    for _ in range(400):
        states.append(moved(model, generator))
        ema.update(model)
    for law, shadow in zip(ema.averages, ema.shadows):
        gamma, weights = weighting(law.width, 400)
        expected = sum(w * state for w, state in zip(weights, states))
        spread = torch.stack(states[-40:]).std(0).mean()
        assert (shadow["weight"] - expected).abs().max() < 0.05 * spread
        keep = 1.0
        exact = torch.zeros_like(expected)
        for i in range(400, 0, -1):
            exact += keep * (1 - (1 - 1 / i) ** (gamma + 1)) * states[i - 1]
            keep *= (1 - 1 / i) ** (gamma + 1)
        torch.testing.assert_close(shadow["weight"], exact, rtol=1e-4, atol=1e-5)


def moved(model, generator):
    """Moves the weights by a random step; the weight matrix after it."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator))
    return model.weight.detach().clone()


def test_a_constant_decay_is_the_recursion_it_says(generator):
    model = nn.Linear(3, 2)
    ema = EMA(model, ConstantDecay(0.99))
    expected = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    for n in range(20):
        moved(model, generator)
        ema.update(model)
        decay = min(0.99, (1 + n) / (10 + n))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in ema.shadow.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(ema.shadow)
    moved(model, generator)
    assert all(torch.equal(ema.shadow[n], before[n]) for n in before)
    assert ConstantDecay(0.9999).decay(89_980) < 0.9999 <= ConstantDecay(0.9999).decay(89_990)


def test_bad_averages_are_refused():
    model = nn.Linear(2, 2)
    for width in (0.0, -0.1, 0.3, 0.9999):
        with pytest.raises(ValueError, match=rf"ema: got {width}, expected a relative width .* --ema-decay"):
            PowerLaw(width)
    with pytest.raises(ValueError, match=r"ema_decay: got 1.0, expected a number in \[0, 1\)"):
        ConstantDecay(1.0)
    with pytest.raises(ValueError, match=r"ema: got widths \[0.1\] and ema_decay 0.9, expected one of the two"):
        laws([0.1], 0.9)
    with pytest.raises(ValueError, match=r"expected widths that differ by 0.001"):
        laws([0.1, 0.1002], None)
    for averages in ((), (0.9,), (ConstantDecay(0.9), PowerLaw(0.1))):
        with pytest.raises(TypeError, match="averages: got"):
            EMA(model, *averages)


def test_weights_are_named_by_their_width():
    assert folder_names([0.05, 0.1]) == ["ema", "ema-0.100"]
    known = {"model": "model", "ema": "ema", "ema-0.05": "ema", "ema-0.10": "ema-0.100", "ema-.1": "ema-0.100"}
    assert {name: folder_of_weights(name, [0.05, 0.1]) for name in known} == known
    assert folder_of_weights("ema", []) == "ema"
    for name in ("ema-0.2", "ema-", "best", "ema-0.05x"):
        with pytest.raises(ValueError, match=f"weights: got '{name}', expected one of 'model', 'ema', 'ema-0.050'"):
            folder_of_weights(name, [0.05, 0.1])
    with pytest.raises(ValueError, match=r"expected one of 'model', 'ema'$"):
        folder_of_weights("ema-0.1", [])
