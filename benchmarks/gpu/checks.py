"""What all correctness tests on the GPU do: an op against fp64, with gradients, twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import products_in
from hpdm_kernels.testing import assert_within_budget, max_error, poisoned_allocations, value_and_grads

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Ways to take products: dtype, precision argument, allowed multiple of PyTorch's own error in the same arithmetic.
# 3xTF32 drops the product of the two low parts and cuts them to 11 bits, a few units of 2^-24 per product, where full
# fp32 rounds sums alone: it may err more where sums are short.
ARITHMETIC = {
    "fp32-ieee": (torch.float32, "ieee", 2.0),
    "fp32-3xtf32": (torch.float32, "tf32x3", 4.0),
    "fp32-1xtf32": (torch.float32, "tf32", 2.0),
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

    What ``ours`` allocates is filled with NaN first, so an element that no kernel writes shows. The largest ratio of
    error and budget goes into the report, also where it fails, and whether the two runs agreed.

    Args:
        request: the test's, to attach what goes into the report to.
        ours: the op under test on ``inputs``.
        formula: the plain implementation, which in fp64 is the oracle.
        inputs: floating inputs, all of which get gradients.
        factor: see :func:`hpdm_kernels.testing.assert_within_budget`.
        tf32: whether the plain implementation takes fp32 products in TF32 too.
    """
    wide = [t.detach().double() for t in inputs]
    with torch.no_grad():
        grad = torch.randn_like(formula(*inputs))
    oracle, oracle_grads = value_and_grads(formula, wide, grad.double())
    with products_in("tf32" if tf32 else "ieee"):
        plain, plain_grads = value_and_grads(formula, inputs, grad)
    with poisoned_allocations():
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
    same = all(torch.equal(mine, repeat) for _, mine, _, _, repeat in rows)
    # JSON has no infinity.
    request.node.user_properties.append(("error_of_budget", min(worst, 1e9)))
    request.node.user_properties.append(("repeats", same))
    for name, mine, near, true, repeat in rows:
        assert_within_budget(name, mine, near, true, factor=factor)
        assert torch.equal(mine, repeat), f"{name}: two runs differ"
