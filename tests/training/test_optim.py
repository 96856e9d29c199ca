"""LAMB, the schedule and the moving average."""

import copy

import pytest
import torch
from torch import nn

from hpdm.training.optim import EMA, Lamb, learning_rate, make_optimizer


def lamb_by_hand(w, grads, lr, wd, eps=1e-6, beta1=0.9, beta2=0.999):
    """Algorithm 2 of the LAMB paper for one tensor, in fp64."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for n, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        r = (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + eps) + wd * w
        w = w - lr * w.norm() / r.norm() * r
    return w


def test_lamb_follows_its_algorithm(generator):
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    grads = [torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(5)]
    p = nn.Parameter(start.clone())
    optimizer = Lamb([p], lr=0.01, weight_decay=0.05)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(p.detach(), lamb_by_hand(start, grads, 0.01, 0.05))


def test_lamb_moves_a_zero_tensor():
    p = nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.ones(3, 3)
    Lamb([p], lr=0.1).step()
    assert torch.isfinite(p).all()
    assert (p < 0).all()


def test_lamb_refuses_bad_numbers():
    p = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match="lr, eps, weight_decay: got -1"):
        Lamb(p, lr=-1.0)
    with pytest.raises(ValueError, match="betas: got"):
        Lamb(p, betas=(0.9, 1.0))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_optimizers_decay_matrices_alone_and_minimize(name, generator):
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = make_optimizer(model, name, 0.02, 0.01)
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert all(decays[id(p)] == (0.01 if p.ndim >= 2 else 0.0) for p in model.parameters())
    x = torch.randn(64, 4, generator=generator)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="optimizer: got 'sgd'"):
        make_optimizer(nn.Linear(2, 2), "sgd", 0.1, 0.0)


def test_the_schedule_warms_up_and_comes_down():
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


def test_ema_is_the_recursion_it_says(generator):
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.99)
    expected = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    for n in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        ema.update(model)
        decay = min(0.99, (1 + n) / (10 + n))
        for name, p in model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
    for name, value in ema.shadow.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(ema.shadow)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1.0)
    assert all(torch.equal(ema.shadow[n], before[n]) for n in before)
    with pytest.raises(ValueError, match="ema decay: got 1"):
        EMA(model, 1.0)
