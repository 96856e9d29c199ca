"""Norms of weights and updates in the log, held to the changes that a step really made."""

import pytest
import torch
from torch import nn

from hpdm.training.optim import make_optimizer, zero_matrices
from hpdm.training.statistics import optimizer_statistics

PARTS = (("first, middle", "0."), ("rest", ""))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_norms_are_those_of_the_step(name, generator):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    nn.init.zeros_(model[2].weight)
    optimizer = make_optimizer(model, name, 0.03, 0.1, zero_matrices(model))
    assert optimizer_statistics(model, optimizer, PARTS) == {}
    x = torch.randn(16, 5, generator=generator)
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    statistics = optimizer_statistics(model, optimizer, PARTS)
    changed = [p.detach() - old for p, old in zip(model.parameters(), before)]
    for part, rows in (("first_middle", slice(0, 2)), ("rest", slice(2, 4))):
        update = torch.cat([t.flatten() for t in changed[rows]]).norm()
        assert statistics[f"update_norm_{part}"] == pytest.approx(float(update), rel=1e-4)
        norm = torch.cat([p.detach().flatten() for p in list(model.parameters())[rows]]).norm()
        assert statistics[f"weight_norm_{part}"] == pytest.approx(float(norm), rel=1e-5)
    trust = {key: value for key, value in statistics.items() if key.startswith("trust")}
    assert set(trust) == ({"trust_min", "trust_median", "trust_max"} if name == "lamb" else set())
    if name == "lamb":
        # A rescaled step is as long as lr * norm, and the factor is what makes it so.
        assert float(changed[0].norm()) == pytest.approx(0.03 * float(before[0].norm()), rel=1e-5)
        assert trust["trust_min"] <= trust["trust_median"] <= trust["trust_max"]


def test_a_parameter_without_a_gradient_is_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = make_optimizer(model, "lamb", 0.1, 0.0)
    model[1](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    statistics = optimizer_statistics(model, optimizer, PARTS)
    assert "weight_norm_rest" in statistics
    assert "weight_norm_first_middle" not in statistics
