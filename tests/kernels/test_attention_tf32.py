"""Attention in one TF32 pass: every operand of every product is rounded to TF32, and nothing else is."""

import math

import pytest
import torch
from torch import Tensor

from hpdm_kernels import cross_attention
from hpdm_kernels.testing import value_and_grads

SMALLEST_BLOCK = 32
"""The fewest keys that a block of the forward has."""
NAMES = ("out", "dq", "dk", "dv")
SHAPES = [
    # B, h, M, N, d: with partial blocks, whole ones, and several
    (2, 3, 5, 7, 24),
    (1, 2, 65, 32, 64),
    (1, 1, 40, 90, 160),
    (1, 2, 128, 128, 32),
    (1, 1, 140, 300, 16),
]


def make(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """``q``, ``k``, ``v`` and the gradient of the output."""
    b, h, m, n, d = shape
    return [torch.randn(b, h, rows, d, generator=generator).to(device) for rows in (m, n, n, m)]


def ours(key_mask: Tensor | None = None):
    return lambda q, k, v: cross_attention(q, k, v, key_mask=key_mask, precision="tf32", backend="triton")


def rounded(x: Tensor) -> Tensor:
    """``x`` with 11 significant bits, ties away from zero, in fp64."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(mantissa.sign() * (mantissa.abs() * 2**11 + 0.5).floor(), exponent - 11)


def formula(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, key_mask: Tensor | None, r) -> list[Tensor]:
    """Output and gradients in fp64, with ``r`` applied to every operand of a product."""
    q, k, v, grad = (t.double() for t in (q, k, v, grad))
    scale = q.shape[-1] ** -0.5
    s = r(q) @ r(k).mT * scale
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None, None], -torch.inf)
    top = s.amax(-1, keepdim=True)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    out = r(weights) @ r(v) / total
    p = weights / total
    ds = p * (r(grad) @ r(v).mT - (grad * out).sum(-1, keepdim=True))
    return [out, r(ds) @ r(k) * scale, r(ds).mT @ r(q) * scale, r(p).mT @ r(grad)]


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "half of the keys"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_operand_is_rounded(shape, masked, generator, device):
    """The results are five times nearer to the formula with rounded operands than that is to the exact one.

    Not nearer, since errors of fp32 decide how some weights are rounded. Where few weights are, one that is rounded the
    other way counts as much as a fault, so the tenth of the elements that are furthest off is left out: truncated
    operands, or one operand as it is, show in all of them. After several blocks of keys the output, which the gradients
    of queries and keys depend on, is less near: the weights of a block are rounded relative to the largest score so
    far.
    """
    q, k, v, grad = make(shape, generator, device)
    key_mask = None
    if masked:
        key_mask = torch.rand(shape[0], shape[3], generator=generator) < 0.5
        key_mask[:, 0] = True
        key_mask = key_mask.to(device)
    out, grads = value_and_grads(ours(key_mask), (q, k, v), grad)
    expected = formula(q, k, v, grad, key_mask, rounded)
    exact = formula(q, k, v, grad, key_mask, lambda t: t)
    for name, x, with_rounding, without in zip(NAMES, [out, *grads], expected, exact):
        cost = (with_rounding - without).square().mean().sqrt().item()
        assert cost > 0
        share = 0.6 if shape[3] > SMALLEST_BLOCK else 0.2
        off = (x - with_rounding).abs().flatten().sort().values
        error = off[: math.ceil(0.9 * len(off))].square().mean().sqrt().item()
        assert error < share * cost, f"{name}: {error / cost:.2f}"


def test_rounded_inputs_give_the_same_bits(generator, device):
    """Whichever operands they are: rounding twice is rounding once."""
    q, k, v, grad = make((1, 2, 65, 100, 64), generator, device)
    before = value_and_grads(ours(), (q, k, v), grad)
    after = value_and_grads(ours(), [rounded(t).float() for t in (q, k, v)], grad)
    assert torch.equal(before[0], after[0])
    for name, x, y in zip(NAMES[1:], before[1], after[1]):
        assert torch.equal(x, y), name
    # The gradient of the output is an operand for dv alone; for the others it is also multiplied by the output.
    dv = value_and_grads(ours(), (q, k, v), rounded(grad).float())[1][2]
    assert torch.equal(before[1][2], dv)


def test_results_have_no_bias(generator, device):
    """Truncated operands would make averages of positive values 3.5e-4 too small, however many values there are."""
    q, k, v, _ = make((1, 1, 64, 1000, 64), generator, device)
    v = 1 + torch.rand(v.shape, generator=generator).to(device)
    out = ours()(q, k, v).double()
    exact = torch.softmax(q.double() @ k.double().mT / 8, -1) @ v.double()
    assert abs((out / exact - 1).mean().item()) < 3e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_are_not_rounded_away(value, generator, device):
    q, k, v, _ = make((1, 1, 5, 40, 16), generator, device)
    # All bits of this NaN are set: a rounding that carries would make zero of it.
    v[0, 0, 3, 4] = torch.tensor(-1, dtype=torch.int32).view(torch.float32) if value != value else value
    out = ours()(q, k, v)
    assert not out[..., 4].isfinite().any()
    assert out[..., :4].isfinite().all()
