"""Optimizers whose step takes clipping and moving averages along: the same as each by itself, and old checkpoints."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from hpdm.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from hpdm.training.ema import EMA, ConstantDecay, PowerLaw
from hpdm.training.optim import make_optimizer
from hpdm.training.step import clip_factor, update
from tests.processes import run_ranks

NAMES = ("adamw", "lamb", "muon")


def network(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))


def optimizer_of(model, name, kernels="torch"):
    return make_optimizer(model, name, 0.01, 0.02, ("4.weight",), [model[2]], kernels)


def averages_of(model):
    return EMA(model, PowerLaw(0.1), PowerLaw(0.05))


def data(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 6, generator=g)
    return x, torch.stack((x[:, 0] * x[:, 1], x.sum(1)), dim=1) + 0.1 * torch.randn(32, 2, generator=g)


def train(model, optimizer, ema, steps, **options):
    """Losses of some steps, each of its own batch."""

    def losses_of(seed):
        x, y = data(seed)
        return (model(x) - y).square().mean().reshape(1)

    return [update(model, optimizer, ema, [lambda n=n: losses_of(n)], **options).losses.item() for n in steps]


def by_hand(name, steps, clip_norm):
    """The same in PyTorch's own operations: clipped gradients are written, the optimizer steps, then averages move."""
    model = network()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    state = {p: [torch.zeros_like(p, dtype=torch.float64) for _ in range(2)] for p in model.parameters()}
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.99), weight_decay=0.02
    )
    averages = [{p: p.detach().double() for p in model.parameters()} for _ in range(2)]
    losses = []
    for n in steps:
        x, y = data(n)
        loss = (model(x) - y).square().mean()
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if name == "adamw":
            adamw.step()
        else:
            for p in model.parameters():
                m, v = state[p]
                m.mul_(0.9).add_(0.1 * p.grad.double())
                v.mul_(0.999).add_(0.001 * p.grad.double().square())
                step = m / (1 - 0.9 ** (n + 1)) / ((v / (1 - 0.999 ** (n + 1))).sqrt() + 1e-6)
                if p.ndim == 2:
                    step += 0.02 * p.detach().double()
                    least = math.sqrt(p.numel() * 2 / sum(p.shape)) if p is model[4].weight else 0.0
                    step *= max(float(p.detach().norm()), least) / step.norm()
                p.data -= 0.01 * step.float()
        for law, average in zip((PowerLaw(0.1), PowerLaw(0.05)), averages):
            for p in model.parameters():
                average[p].lerp_(p.detach().double(), 1 - law.decay(n))
    return losses, list(model.parameters()), averages


@pytest.mark.parametrize("kernels", ["reference", "torch", "triton"])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_fifty_steps_are_those_of_plain_pytorch(name, kernels):
    """Whose rounding differs; the losses may drift apart by 0.1 %."""
    model = network()
    optimizer, ema = optimizer_of(model, name, kernels), averages_of(model)
    steps = range(50 if kernels != "triton" else 25)  # interpreted kernels take their time
    losses = train(model, optimizer, ema, steps, clip_norm=0.5)
    expected, params, averages = by_hand(name, steps, 0.5)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert expected[-1] < 0.8 * expected[0]
    for (key, p), q in zip(model.named_parameters(), params):
        torch.testing.assert_close(p, q, rtol=0, atol=0.01 * float((q - network().get_parameter(key)).detach().norm()))
        for shadow, average in zip(ema.shadows, averages):
            torch.testing.assert_close(shadow[key].double(), average[q], rtol=0, atol=1e-3)
    assert ema.updates == len(steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_step_changes_not_one_bit(name):
    model = network()
    optimizer, ema = optimizer_of(model, name), averages_of(model)
    train(model, optimizer, ema, range(2))
    state = lambda: [
        t.clone() for p in model.parameters()
        for t in (p.detach(), *optimizer.state[p].values(), *(a[0] for a in ema.averages_of([p])))
    ]  # fmt: skip
    before, updates = state(), ema.updates
    last = [norms.trust.clone() for norms in getattr(optimizer, "last", ())]

    def accept(norm):
        for p in model.parameters():
            p.grad.fill_(math.nan)
        return torch.tensor(False)

    train(model, optimizer, ema, [2], accept=accept)
    assert all(map(torch.equal, before, state()))
    assert all(map(torch.equal, last, [norms.trust for norms in getattr(optimizer, "last", ())]))
    assert ema.updates == updates
    train(model, optimizer, ema, [3])
    assert ema.updates == updates + 1
    assert not all(map(torch.equal, before, state()))


def test_gradients_are_not_written_by_clipping():
    model = network()
    optimizer, ema = optimizer_of(model, "adamw"), averages_of(model)
    kept = []
    train(
        model, optimizer, ema, [0], clip_norm=1e-3,
        accept=lambda norm: kept.extend(p.grad.clone() for p in model.parameters()) or torch.tensor(True),
    )  # fmt: skip
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept))
    assert clip_factor(torch.tensor(4.0), 0.0).item() == 1
    assert clip_factor(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25)
    assert clip_factor(torch.tensor(0.1), 1.0).item() == 1


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_averages_of_parameters_without_gradients_move_too(name):
    model = network()
    optimizer, ema = optimizer_of(model, name), averages_of(model)
    train(model, optimizer, ema, range(3))
    for p in model[0].parameters():
        p.requires_grad_(False)
        p.grad = None
    before = [t.clone() for t in ema.shadow.values()]
    expected = [torch.lerp(t, p, 1 - PowerLaw(0.1).decay(3)) for t, p in zip(before, model[0].parameters())]
    counts = [float(optimizer.state[p]["step"]) for p in model.parameters()]
    train(model, optimizer, ema, [3])
    for t, value in zip(ema.shadow.values(), expected):
        torch.testing.assert_close(t, value)
    assert not any(map(torch.equal, before, ema.shadow.values()))
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [
        *counts[:2],
        *(n + 1 for n in counts[2:]),
    ]


def test_checkpoints_of_pytorchs_adamw_are_continued(tmp_path):
    """As earlier versions wrote them, with a counter of its own for each parameter: the same weights, bit for bit."""
    model, peer = network(), network()
    groups = lambda m: [
        {"params": [p for p in m.parameters() if p.ndim == 2]},
        {"params": [p for p in m.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]  # fmt: skip
    theirs = torch.optim.AdamW(groups(peer), lr=0.01, betas=(0.9, 0.99), weight_decay=0.02, fused=True)
    averages = EMA(peer, ConstantDecay(0.9))
    train(peer, theirs, averages, range(4))
    save_checkpoint(tmp_path, 4, peer, averages, theirs)
    optimizer, ema = optimizer_of(model, "adamw"), EMA(model, ConstantDecay(0.9))
    assert load_checkpoint(list_checkpoints(tmp_path)[-1], model, ema, optimizer) == 4
    assert ema.updates == 4
    for m, o, e in ((peer, theirs, averages), (model, optimizer, ema)):
        train(m, o, e, range(4, 8))
    assert all(map(torch.equal, model.parameters(), peer.parameters()))
    assert all(map(torch.equal, ema.shadow.values(), averages.shadow.values()))
    save_checkpoint(tmp_path, 8, model, ema, optimizer)
    again, its = network(5), None
    its = optimizer_of(again, "adamw")
    load_checkpoint(list_checkpoints(tmp_path)[-1], again, EMA(again, ConstantDecay(0.9)), its)
    assert all(float(its.state[p]["step"]) == 8 for p in again.parameters())


def test_pytorchs_protocol_is_kept():
    """A closure, a state that is saved and loaded, groups whose rate changes."""
    model = network()
    optimizer = optimizer_of(model, "lamb")

    def closure():
        optimizer.zero_grad()
        x, y = data(0)
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad
    other = network()
    other.load_state_dict(model.state_dict())
    theirs = optimizer_of(other, "lamb")
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.step(closure) < first
    model, optimizer, ours = other, theirs, model
    optimizer.step(closure)
    assert all(map(torch.equal, ours.parameters(), other.parameters()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.clone() for p in other.parameters()]
    optimizer.step(closure)
    assert all(map(torch.equal, before, other.parameters()))


def _sharded(out):
    """Trains a few steps with sharded parameters, some of which have fewer rows than there are ranks."""
    from torch.distributed.fsdp import fully_shard

    from hpdm import distributed

    whole = lambda t: t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach()
    results = {}
    with distributed.process_group(torch.device("cpu")):
        for name in ("adamw", "lamb"):
            model = network()
            if distributed.world_size() > 1:
                fully_shard(model)
            optimizer, ema = optimizer_of(model, name), averages_of(model)
            losses = train(model, optimizer, ema, range(4), clip_norm=0.5)
            tensors = [*model.parameters(), *(t for shadow in ema.shadows for t in shadow.values())]
            norms = [norms.trust for norms in getattr(optimizer, "last", ())]
            results[name] = losses, list(map(whole, tensors)), norms
        if distributed.is_first():
            torch.save(results, Path(out) / f"{distributed.world_size()}.pt")


def test_sharded_parameters_take_the_steps_of_whole_ones(tmp_path):
    """The last layer has two rows: of four ranks two have none of it."""
    _sharded(tmp_path)
    for ranks in (2, 4):
        run_ranks(_sharded, ranks, tmp_path)
    alone, *others = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2, 4))
    for results in others:
        for name, (losses, tensors, norms) in results.items():
            assert losses == pytest.approx(alone[name][0], rel=1e-5)
            torch.testing.assert_close(tensors, alone[name][1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(norms, alone[name][2], rtol=1e-4, atol=1e-6)
