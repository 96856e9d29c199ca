"""Muon beside AdamW: which parameters it steps, how far, and that a run goes on as if it had not been interrupted."""

import math

import pytest
import torch
from torch import nn

from hpdm.patch.system import PatchDiffusion
from hpdm.training.muon import MuonAdamW
from hpdm.training.optim import make_optimizer
from hpdm.training.statistics import optimizer_statistics
from tests.small import small_config


def network():
    return nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 40), nn.Linear(40, 3))


def with_gradients(model, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)
    return model


def test_hidden_matrices_step_in_all_directions_alike_and_the_rest_as_adamw():
    torch.manual_seed(3)
    ours, peer = network(), network()
    peer.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, "muon", 0.02, 0.0, hidden_modules=[ours[1]])
    adamw = make_optimizer(peer, "adamw", 0.02, 0.0)
    before = ours[1].weight.detach().clone()
    for seed in (5, 6):
        for model, o in ((ours, optimizer), (peer, adamw)):
            with_gradients(model, seed)
            before = ours[1].weight.detach().clone() if model is ours else before
            o.step()
    step = (ours[1].weight - before).detach()
    lengths = torch.linalg.svdvals(step) / (0.02 * 0.2 * math.sqrt(40))
    assert len(lengths) == 24
    assert lengths.min() > 0.4
    assert lengths.max() < 1.6
    for name, p in ours.named_parameters():
        assert torch.equal(p, dict(peer.named_parameters())[name]) == (name != "1.weight"), name


def test_a_rate_that_is_set_is_that_of_both():
    model = with_gradients(network(), 1)
    optimizer = make_optimizer(model, "muon", 0.02, 0.01, hidden_modules=[model[1]])
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_the_log_counts_its_steps():
    model = with_gradients(network(), 2)
    optimizer = make_optimizer(model, "muon", 0.02, 0.0, hidden_modules=[model[1]])
    before = model[1].weight.detach().clone()
    optimizer.step()
    logged = optimizer_statistics(model, optimizer, [("hidden", "1.weight"), ("rest", "")])
    length = float((model[1].weight.detach() - before).norm())
    assert logged["update_norm_hidden"] == pytest.approx(length, rel=0.3)
    assert logged["update_norm_rest"] > 0


def test_what_it_cannot_step_is_refused():
    with pytest.raises(ValueError, match="without hidden matrices"):
        make_optimizer(network(), "muon", 0.02, 0.0)
    with pytest.raises(ValueError, match=r"hidden: got shapes \[\(2, 3, 4\)\]"):
        MuonAdamW([nn.Parameter(torch.zeros(2, 3, 4))], [{"params": [nn.Parameter(torch.zeros(1))]}], 0.1, 0.0)
    with pytest.raises(ValueError, match="expected 'adamw', 'lamb' or 'muon'"):
        make_optimizer(network(), "sgd", 0.02, 0.0)


def test_it_steps_the_matrices_of_the_blocks():
    system = PatchDiffusion()
    model = system.build(small_config())
    optimizer = make_optimizer(model, "muon", 0.02, 0.0, hidden_modules=system.hidden_modules(model))
    hidden = {id(p) for p in optimizer.hidden}
    expected = {name for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    assert {name for name, p in model.named_parameters() if id(p) in hidden} == expected
    assert len(expected) > 20
