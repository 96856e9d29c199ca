"""Operands of one TF32 pass are rounded to nearest, ties away from zero."""

import math

import pytest
import torch

from hpdm_kernels import _triton
from hpdm_kernels._tf32 import as_operand
from hpdm_kernels._triton import jit, tl

pytestmark = pytest.mark.skipif(not _triton.AVAILABLE, reason="triton is not installed")


@jit
def _operand_kernel(x_ptr, out_ptr, PRECISION: tl.constexpr):
    at = tl.arange(0, 1024)
    tl.store(out_ptr + at, as_operand(tl.load(x_ptr + at), PRECISION))


def operand(x: torch.Tensor, precision: str) -> torch.Tensor:
    """``as_operand`` of up to 1024 numbers."""
    padded = torch.zeros(1024, dtype=x.dtype, device=x.device)
    padded[: x.numel()] = x
    out = torch.empty_like(padded)
    _operand_kernel[(1,)](padded, out, PRECISION=precision)
    return out[: x.numel()]


def nearest(x: float) -> float:
    """The nearest number of 11 significant bits, ties away from zero, in exact arithmetic."""
    mantissa, exponent = math.frexp(abs(x))
    return math.copysign(math.ldexp(math.floor(mantissa * 2**11 + 0.5), exponent - 11), x)


def test_operands_are_rounded_to_eleven_bits(generator, device):
    x = torch.randn(1000, generator=generator) * 2.0 ** torch.randint(-60, 60, (1000,), generator=generator)
    assert operand(x.to(device), "tf32").tolist() == [nearest(v) for v in x.tolist()]


def test_ties_go_away_from_zero(device):
    x = torch.tensor([1 + 2**-11, -(1 + 2**-11), 1 + 3 * 2**-11, 2 - 2**-11, 1 + 2**-11 - 2**-23, 0.0, -1.0])
    rounded = [1 + 2**-10, -(1 + 2**-10), 1 + 2**-9, 2.0, 1.0, 0.0, -1.0]
    assert operand(x.to(device), "tf32").tolist() == rounded


def test_numbers_that_are_not_finite_stay_so(device):
    # The second NaN has all bits set: a rounding that carries would make zero of it.
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    largest = torch.finfo(torch.float32).max
    x = torch.cat([nan, torch.tensor([math.inf, -math.inf, largest, -largest])])
    assert operand(x[:3].to(device), "tf32").isnan().all()
    assert operand(x[3:].to(device), "tf32").tolist() == [math.inf, -math.inf, math.inf, -math.inf]


@pytest.mark.parametrize(("precision", "dtype"), [("ieee", "float32"), ("tf32x3", "float32"), ("tf32", "float16")])
def test_other_products_take_operands_as_they_are(precision, dtype, generator, device):
    x = torch.randn(1000, generator=generator).to(device, getattr(torch, dtype))
    assert torch.equal(operand(x, precision), x)
