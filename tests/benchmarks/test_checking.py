"""The checks themselves: ``compare_op`` sees every kind of fault, and the TF32 yardstick is what the kernels do."""

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.cases import RMS_FACTOR
from benchmarks.gpu.tf32 import RoundedProducts, rounded, value_and_grads_in_tf32
from hpdm_kernels.testing import assert_within_budget, check_op, compare_op, max_error, value_and_grads


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@pytest.fixture
def matrices(generator):
    return [torch.randn(7, 33, generator=generator), torch.randn(33, 5, generator=generator)]


def with_gradient(of_a, of_b):
    """``a @ b`` whose gradients are changed by two functions."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return of_a(grad @ b.T), of_b(a.T @ grad)

    return Product.apply


def same(t):
    return t


def test_what_is_right_passes(matrices):
    found = compare_op(with_gradient(same, same), product, matrices, repeat=True)
    assert found.problem is None
    assert found.same_bits is True
    assert 0 <= found.share <= 1
    assert check_op(product, product, matrices) <= 0.5
    assert compare_op(product, product, matrices).same_bits is None


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (lambda a, b: (a @ b) * 1.001, "output: error"),
        (lambda a, b: (a @ b).bfloat16(), "output: got dtype torch.bfloat16, expected torch.float32"),
        (with_gradient(same, lambda g: g * 1.001), "gradient of right: error"),
        (with_gradient(lambda g: None, same), "gradient of left: got no gradient, expected one"),
        (with_gradient(lambda g: torch.full_like(g, torch.nan), same), "gradient of left: error inf"),
        (with_gradient(lambda g: torch.empty_like(g), same), "gradient of left: error inf"),
    ],
    ids=["value", "dtype", "gradient", "no gradient", "nan", "not written"],
)
def test_what_is_wrong_is_named(matrices, ours, message):
    with pytest.raises(AssertionError, match=message):
        check_op(ours, product, matrices, names=("left", "right"))


def test_another_shape_is_named():
    exact = torch.ones(7, 5)
    with pytest.raises(AssertionError, match=r"output: got shape \(1, 7, 5\), expected \(7, 5\)"):
        assert_within_budget("output", exact[None], exact, exact.double())


def test_two_runs_must_agree(matrices):
    runs = []

    def ours(a, b):
        runs.append(len(runs))
        return a @ b + 1e-7 * len(runs)

    found = compare_op(ours, product, matrices, repeat=True)
    assert found.same_bits is False
    assert found.problem == "output: two runs differ"
    assert found.share <= 1


def test_thirteen_bits_are_rounded_away():
    exact = torch.tensor(
        [1.0, -1.0, 1 + 2**-10, 1 + 2**-11, -(1 + 2**-10 + 2**-12), 2 - 2**-12, 2.0**-60, 0.0]
    ).double()
    near = torch.tensor([1.0, -1.0, 1 + 2**-10, 1 + 2**-10, -(1 + 2**-10), 2.0, 2.0**-60, 0.0]).double()
    assert torch.equal(rounded(exact), near)


def test_products_are_rounded_in_both_directions(matrices):
    grad = torch.randn(7, 5)
    out, (of_a, of_b) = value_and_grads_in_tf32(product, matrices, grad)
    a, b, g = (rounded(t.double()) for t in (*matrices, grad))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, (a @ b).float(), rtol=0, atol=0)
    torch.testing.assert_close(of_a, (g @ b.T).float(), rtol=0, atol=0)
    torch.testing.assert_close(of_b, (a.T @ g).float(), rtol=0, atol=0)


@pytest.mark.parametrize("shapes", [((1, 8), (8, 4)), ((2, 3, 1, 8), (2, 3, 8, 4))], ids=["matrices", "batches"])
def test_every_form_of_a_product_is_seen(shapes):
    a, b = (torch.randn(s).double() for s in shapes)
    bias = torch.randn(4).double()
    with RoundedProducts():
        results = [a @ b, torch.einsum("...ij,...jk->...ik", a, b)]
        if a.dim() == 2:
            results.append(torch.nn.functional.linear(a, b.T, bias) - bias)
    for result in results:
        torch.testing.assert_close(result, rounded(a) @ rounded(b))
    with RoundedProducts(), pytest.raises(NotImplementedError, match="expected mm, bmm or addmm"):
        torch.mv(torch.ones(2, 2), torch.ones(2))


def test_the_yardstick_is_that_of_rounded_operands(generator):
    """Rounded operands pass with a factor of 2; truncated ones, as of tensor cores left to themselves, do not."""
    inputs = [torch.randn(64, 256, generator=generator), torch.randn(256, 64, generator=generator)]

    def products(kept):
        class Products(torch.autograd.Function):
            @staticmethod
            def forward(ctx, a, b):
                ctx.save_for_backward(a, b)
                return (kept(a) @ kept(b)).float()

            @staticmethod
            def backward(ctx, grad):
                a, b = ctx.saved_tensors
                return (kept(grad) @ kept(b).T).float(), (kept(a).T @ kept(grad)).float()

        return Products.apply

    def nearest(t):
        mantissa, exponent = torch.frexp(t.double())
        return torch.ldexp((mantissa * 2**11).round(), exponent - 11)

    def truncated(t):
        return (t.view(torch.int32) & -(1 << 13)).view(torch.float32).double()

    compared = compare_op(products(nearest), product, inputs, plain=value_and_grads_in_tf32)
    assert 0.45 < compared.share < 0.55
    # Of random signs the errors of truncated operands are twice as large, of positive numbers they add up.
    positive = [t.abs() for t in inputs]
    assert compare_op(products(truncated), product, positive, plain=value_and_grads_in_tf32).share > 2
    # The root mean squares tell the two apart where the largest errors would not.
    generous = {"factor": 100.0, "rms_factor": RMS_FACTOR, "plain": value_and_grads_in_tf32}
    assert compare_op(products(nearest), product, inputs, **generous).problem is None
    problem = compare_op(products(truncated), product, inputs, **generous).problem
    assert problem.startswith("output: rms error"), problem
    true, _ = value_and_grads(product, [t.double() for t in inputs])
    assert max_error(value_and_grads_in_tf32(product, inputs, None)[0], true) > 1e-3
