"""LAMB: its algorithm, matrices that start at zero, and which parameters are rescaled."""

import pytest
import torch
from torch import nn

from hpdm.training.lamb import Lamb, xavier_norm
from hpdm.training.optim import make_optimizer, zero_matrices
from hpdm.training.schedule import learning_rate
from hpdm_kernels.optimizer import torch_backend


def lamb_by_hand(w, grads, lr, wd, least=0.0, eps=1e-6, beta1=0.9, beta2=0.999):
    """Algorithm 2 of the LAMB paper for one tensor, in fp64, the norm of whose weights counts as ``least`` or more."""
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for n, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        r = (m / (1 - beta1**n)) / ((v / (1 - beta2**n)).sqrt() + eps) + wd * w
        w = w - lr * max(float(w.norm()), least) / r.norm() * r
    return w


def stepped(start, grads, lr, wd, least=0.0):
    p = nn.Parameter(start.clone())
    optimizer = Lamb([p], lr=lr, weight_decay=wd, least_norms={p: least} if least else None)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_lamb_follows_its_algorithm(generator):
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    grads = [torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(5)]
    torch.testing.assert_close(stepped(start, grads, 0.01, 0.05), lamb_by_hand(start, grads, 0.01, 0.05))


def test_parts_change_nothing(generator, monkeypatch):
    """Tensors are stepped a few at a time, or all at once: the same bits. Or in parts: their sums may be rounded."""
    start = [torch.randn(size, generator=generator) for size in ((40, 30), (1,), (20, 20), (7, 3))]
    grads = [[torch.randn(w.shape, generator=generator) for w in start] for _ in range(3)]
    results = []
    for most in (2**18, 40 * 30, 64):
        monkeypatch.setattr(torch_backend, "PIECE", most)
        params = [nn.Parameter(w.clone()) for w in start]
        optimizer = Lamb(params, lr=0.01)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        (norms,) = optimizer.last
        assert all(a is b for a, b in zip(norms.params, params, strict=True))
        results.append([*params, *norms[1:]])
    assert all(map(torch.equal, results[0], results[1]))
    for ours, parts in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(parts, ours, rtol=1e-5, atol=1e-7)


def test_a_zero_matrix_takes_steps_as_long_as_if_it_had_a_size(generator):
    """Gradients of one sign, so that the norm passes 0.5 on the way."""
    grads = [torch.rand(6, 4, generator=generator, dtype=torch.float64) + 0.1 for _ in range(40)]
    start = torch.zeros(6, 4, dtype=torch.float64)
    assert float(stepped(start, grads[:1], 0.05, 0.05, least=0.5).norm()) == pytest.approx(0.05 * 0.5)
    norms = [float(lamb_by_hand(start, grads[:n], 0.05, 0.05, least=0.5).norm()) for n in range(41)]
    assert norms[10] < 0.5 < norms[30]
    for n in (10, 40):
        torch.testing.assert_close(
            stepped(start, grads[:n], 0.05, 0.05, least=0.5), lamb_by_hand(start, grads[:n], 0.05, 0.05, least=0.5)
        )


def test_a_regression_is_begun_in_the_first_500_of_ten_thousand_steps_of_warm_up():
    """Table 8's schedule. 10 % are explained then; without a least norm only after step 6,000."""
    g = torch.Generator().manual_seed(5)
    target = torch.randn(16, 64, generator=g) * 0.1
    left = {}
    for zero_started in (("weight",), ()):
        model = nn.Linear(64, 16, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = make_optimizer(model, "lamb", 5e-3, 0.01, zero_started)
        for step in range(500):
            optimizer.param_groups[0]["lr"] = learning_rate(step, 40_000, 10_000, 5e-3)
            x = torch.randn(64, 64, generator=g)
            noise = torch.randn(64, 16, generator=g) * 0.5
            optimizer.zero_grad()
            (model(x) - x @ target.T - noise).square().mean().backward()
            optimizer.step()
        left[zero_started] = float((model.weight.detach() - target).square().sum() / target.square().sum())
    assert left["weight",] < 0.9
    assert left[()] > 0.999


def test_the_size_of_its_own_is_that_of_xaviers_initialization():
    for shape in ((300, 200), (64, 48, 3, 5)):
        weight = nn.init.xavier_uniform_(torch.empty(shape))
        assert xavier_norm(shape) == pytest.approx(float(weight.norm()), rel=0.03)


def test_zero_matrices_are_found_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    assert zero_matrices(model) == {"1.weight"}  # biases are zero too, but are not rescaled
    optimizer = make_optimizer(model, "lamb", 0.1, 0.0, zero_matrices(model))
    assert isinstance(optimizer, Lamb)
    assert list(optimizer.least_norms) == [model[1].weight]


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
