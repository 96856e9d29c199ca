"""Kernels on equal kernels off: same weights, same batch, within stated error budgets.

The budget of a single step is in units of the plain model's own fp32 error against fp64: outputs at most twice as far
off, gradients at most three times. Plain is the reference; for the ``torch`` backend also the reference with PyTorch's
fused attention, whose backward on the CPU errs about three times as much where softmax gradients cancel (the queries of
the write): that error is the library's, with or without our ops.

The budget of a training run is absolute: AdamW divides by the root of a second moment, which turns a rounding
difference in a tiny gradient into a full-size step, so losses may drift by 0.1 % over 50 steps.
"""

import pytest
import torch

from hpdm import HPDM, presets
from hpdm.patch.boxes import sample_boxes
from hpdm.patch.draws import draw
from hpdm.patch.objective import denoising_error
from hpdm.training.optim import make_optimizer
from hpdm_kernels import modules
from hpdm_kernels.rows import api
from hpdm_kernels.testing import assert_within_budget, max_error

STEPS = {"torch": 50, "triton": 20}  # the interpreter takes its time
DRAWS = 4  # of boxes, times and noise, taken in turn
DRIFT = 1e-3


@pytest.fixture(autouse=True)
def _ops_on_few_rows_too(monkeypatch):
    """On the CPU small models take PyTorch's layers for what stands between the products."""
    monkeypatch.setattr(api, "LEAST", 0)


def config_for(backend, **changes):
    sizes = {"width": 32, "latents": 8, "latent_width": 32, "head_width": 16, "conditioning_width": 32}
    if backend == "triton":  # the interpreter takes milliseconds per block
        sizes |= {
            "patch": (2, 8, 8),
            "width": 16,
            "latents": 4,
            "latent_width": 16,
            "levels": 2,
            "levels_per_block": (1, 2),
        }
    return presets.tiny().replace(**sizes, **changes)


def make(config, kernels, state=None, dtype=torch.float32):
    torch.manual_seed(0)
    model = HPDM(config, kernels)
    if state is None:
        with torch.no_grad():  # where weights start at zero, differences would not show
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    else:
        model.load_state_dict(state)
    return model.to(dtype)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("changes", [{}, {"fusion": "shallow"}, {"coordinates": False, "detach_context": True}])
def test_outputs_and_every_gradient(backend, changes, generator, monkeypatch):
    config = config_for(backend, **changes)
    state = make(config, "reference").state_dict()
    batch = 2
    x = torch.randn(batch, config.levels, 3, *config.patch, generator=generator)
    boxes = sample_boxes(config, batch, generator)
    t = torch.rand(batch, config.levels, generator=generator)
    labels = torch.randint(config.classes, (batch,), generator=generator)
    weight = torch.randn(x.shape, generator=generator)

    def run(kernels, dtype):
        model = make(config, kernels, state, dtype)
        inputs = x.to(dtype).requires_grad_(True)
        # Boxes stay fp32: they are the data that all three agree on.
        out = model(inputs, boxes, t.to(dtype), labels)
        (out * weight.to(dtype)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        return out.detach(), inputs.grad, grads

    oracle, plain, ours = run("reference", torch.float64), run("reference", torch.float32), run(backend, torch.float32)
    if backend == "torch":
        fused = modules.packed_attention
        monkeypatch.setattr(modules, "packed_attention", lambda *given, **o: fused(*given, **o | {"backend": "torch"}))
        library = run("reference", torch.float32)
        worse = {
            n: max((plain[2][n], library[2][n]), key=lambda grad, n=n: max_error(grad, oracle[2][n]))
            for n, grad in oracle[2].items()
            if grad is not None
        }
        plain = (plain[0], plain[1], worse)
    assert_within_budget("output", ours[0], plain[0], oracle[0], ulps=16)
    assert_within_budget("gradient of x", ours[1], plain[1], oracle[1], ulps=16)
    for name, grad in oracle[2].items():
        if grad is None:
            assert ours[2][name] is None, name
            continue
        assert_within_budget(f"gradient of {name}", ours[2][name], plain[2][name], grad, factor=3, ulps=64)


@pytest.mark.parametrize(("backend", "optimizer"), [("torch", "adamw"), ("torch", "lamb"), ("triton", "adamw")])
def test_a_training_run(backend, optimizer):
    config = config_for(backend)
    video = torch.full((1, 3, *config.resolution), 50, dtype=torch.uint8)
    video[:, 0, :, 4:12, 6:14] = 230  # something to learn
    labels = torch.tensor([1])

    def run(kernels):
        model = make(config, kernels)
        rate = 1e-3 if optimizer == "adamw" else 5e-3
        # Interpreted steps of so many tensors take too long; tests/training/test_fused.py has those of a few.
        of_steps = "torch" if kernels == "triton" else kernels
        stepped = make_optimizer(model, optimizer, rate, 0.01, kernels=of_steps)
        losses = []
        for step in range(STEPS[backend]):
            draws = draw(config, 1, torch.Generator().manual_seed(step % DRAWS), dropout=0.1)
            loss = denoising_error(model, video, labels, draws).mean()
            stepped.zero_grad()
            loss.backward()
            stepped.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    off, on = run("reference"), run(backend)
    # On the same draws it has learned, so the comparison means something.
    assert off[-DRAWS:].mean() < 0.95 * off[:DRAWS].mean()
    assert ((on - off).abs() / off).max() < DRIFT
