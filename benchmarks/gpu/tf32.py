"""Emulates TF32 products: the plain implementation for kernels that take one TF32 pass, the same on every machine.

TF32 keeps 10 of the 23 mantissa bits of fp32. The kernels round operands to it as cuBLAS does, on every GPU. PyTorch's
own TF32 is still no yardstick, because cuBLAS does not use TF32 for a few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpdm_kernels.testing import value_and_grads

DROPPED_BITS = 13
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}
# Other operations that compute products, whose operands would not be rounded; the formulas use none of them.
_UNKNOWN = {torch.ops.aten.baddbmm.default, torch.ops.aten.addbmm.default, torch.ops.aten.mv.default}


def rounded(t: Tensor) -> Tensor:
    """Rounds fp64 ``t``, of any shape, to TF32 and back, ties away from zero; the relative error is at most 2^-11."""
    bits = t.float().contiguous().view(torch.int32)
    # Half of the last kept bit is added to the magnitude; the sign is a bit of its own.
    return ((bits + (1 << DROPPED_BITS - 1)) & -(1 << DROPPED_BITS)).view(torch.float32).double()


class RoundedProducts(TorchDispatchMode):
    """Inside the block every matrix product, forward or backward, rounds its operands to TF32.

    Raises:
        NotImplementedError: an operation computes a product in another form.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _UNKNOWN:
            raise NotImplementedError(f"{func}: got a product in this form, expected mm, bmm or addmm")
        if func in _PRODUCTS:
            # The operands are the last two arguments; the first argument of addmm is only added.
            args = (*args[:-2], rounded(args[-2]), rounded(args[-1]))
        return func(*args, **(kwargs or {}))


def value_and_grads_in_tf32(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Same as :func:`hpdm_kernels.testing.value_and_grads`, in fp64 but with operands of products rounded to TF32.

    Results have the dtypes of the inputs.
    """
    wide = [t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    with RoundedProducts():
        out, grads = value_and_grads(formula, wide, None if grad is None else grad.double())
    dtype = next(t.dtype for t in inputs if isinstance(t, Tensor) and t.is_floating_point())
    return out.to(dtype), [g if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True)]
