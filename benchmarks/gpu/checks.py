"""What all correctness tests on the GPU do: an op against fp64, with gradients, twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hpdm_kernels.testing import assert_within_budget, max_error, value_and_grads

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Ways to take products: dtype, precision argument, allowed multiple of PyTorch's own error in the same arithmetic.
# 3xTF32 drops the products of the two low parts, so it may err a little more than fp32.
ARITHMETIC = {
    "fp32-ieee": (torch.float32, "ieee", 2.0),
    "fp32-tf32x3": (torch.float32, "tf32x3", 4.0),
    "fp32-tf32": (torch.float32, "tf32", 2.0),
    "bf16": (torch.bfloat16, "ieee", 2.0),
    "fp16": (torch.float16, "ieee", 2.0),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check(
    request: pytest.FixtureRequest,
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    factor: float = 2.0,
    tf32: bool = False,
) -> None:
    """Value and all gradients of ``ours``: within the budget against fp64, and the same bits in two runs.

    The largest ratio of error and budget goes into the report, also where it fails.

    Args:
        request: the test's, to attach the ratio to.
        ours: the op under test on ``inputs``.
        formula: the plain implementation, which in fp64 is the oracle.
        inputs: floating inputs, all of which get gradients.
        factor: see :func:`hpdm_kernels.testing.assert_within_budget`.
        tf32: whether the plain implementation takes fp32 products in TF32 too.
    """
    wide = [t.double() for t in inputs]
    grad = torch.randn_like(ours(*inputs).detach().float()).to(inputs[0].dtype)
    oracle, oracle_grads = value_and_grads(formula, wide, grad.double())
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        plain, plain_grads = value_and_grads(formula, inputs, grad)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    got, got_grads = value_and_grads(ours, inputs, grad)
    again, again_grads = value_and_grads(ours, inputs, grad)
    names = ["output", *(f"gradient {i}" for i in range(len(inputs)))]
    columns = [[out, *grads] for out, grads in ((got, got_grads), (plain, plain_grads), (oracle, oracle_grads))]
    rows: list[tuple[Any, ...]] = list(zip(names, *columns, [again, *again_grads], strict=True))
    worst = 0.0
    for _, mine, near, true, _ in rows:
        budget = factor * max_error(near, true) + 4 * torch.finfo(mine.dtype).eps * true.abs().max().item()
        error = max_error(mine, true)
        worst = max(worst, error / budget if budget else float(error > 0))
    request.node.user_properties.append(("error_of_budget", worst))
    for name, mine, near, true, repeat in rows:
        assert_within_budget(name, mine, near, true, factor=factor)
        assert torch.equal(mine, repeat), f"{name}: two runs differ"
