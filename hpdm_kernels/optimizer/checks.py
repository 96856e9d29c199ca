"""Validation of what the optimizers take: hundreds of tensors a step, so whole lists are compared first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._checks import check_number, check_tensor
from hpdm_kernels.optimizer.lists import Adam, Lists, is_dense

DTYPES = (torch.float32, torch.float64)
"""Of parameters, moments and averages."""
GRAD_DTYPES = (torch.float16, torch.bfloat16)
"""Of gradients, besides the parameters' own."""


def check_lists(params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, averages: Any) -> Lists:
    """Checks the tensors of a step; gradients in another order of memory than their parameters are copied.

    Raises:
        TypeError: no sequence of tensors, or a dtype that is not allowed.
        ValueError: no tensors, or a length, shape, device or order of memory that does not fit the parameters.
    """
    params = _sequence("params", params)
    if not params:
        raise ValueError("params: got no tensors, expected at least one")
    for i, p in enumerate(params):
        name = f"params[{i}]"
        check_tensor(name, p, dtypes=DTYPES, like=("params[0]", params[0]) if i else None)
        if not is_dense(p):
            raise ValueError(f"{name}: got strides {p.stride()}, expected memory without gaps")
    if isinstance(averages, Tensor) or not isinstance(averages, Sequence) or isinstance(averages, str):
        raise TypeError(f"averages: got {type(averages).__name__}, expected a sequence of sequences of tensors")
    own = (params[0].dtype,)
    grads = _like("grads", grads, params, (*own, *GRAD_DTYPES))
    moments = [_like(name, ts, params, own) for name, ts in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs))]
    others = [_like("averages", average, params, own) for average in averages]
    for name, tensors in (("exp_avgs", moments[0]), ("exp_avg_sqs", moments[1]), *(("averages", a) for a in others)):
        for i in _in_other_order(tensors, params):
            raise ValueError(
                f"{name}[{i}]: got strides {tensors[i].stride()}, expected {params[i].stride()} as for params[{i}]"
            )
    ordered = list(grads)
    for i in _in_other_order(grads, params):
        ordered[i] = torch.empty_like(params[i], dtype=grads[i].dtype, requires_grad=False).copy_(grads[i])
    return Lists(params, ordered, moments[0], moments[1], others)


def _sequence(name: str, tensors: Any) -> Sequence[Tensor]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence) or isinstance(tensors, str):
        raise TypeError(f"{name}: got {type(tensors).__name__}, expected a sequence of tensors")
    return tensors


def _like(name: str, tensors: Any, params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> Sequence[Tensor]:
    """Checks that a list has a tensor for every parameter."""
    tensors = _sequence(name, tensors)
    if len(tensors) != len(params):
        raise ValueError(f"{name}: got {len(tensors)} tensors, expected {len(params)} as for params")
    for i, (t, p) in enumerate(zip(tensors, params)):
        # The whole check of a tensor takes microseconds: it is made where it has something to say.
        if not isinstance(t, Tensor) or t.shape != p.shape or t.dtype not in dtypes or t.device != p.device:
            check_tensor(f"{name}[{i}]", t, tuple(p.shape), dtypes=dtypes, like=(f"params[{i}]", p), same_dtype=False)
        if t.dtype != tensors[0].dtype:
            raise TypeError(f"{name}[{i}]: got dtype {t.dtype}, expected {tensors[0].dtype} as for {name}[0]")
    return tensors


def _in_other_order(tensors: Sequence[Tensor], params: Sequence[Tensor]) -> list[int]:
    """Numbers of the tensors whose elements do not lie as those of their parameters."""
    return [
        i for i, (t, p) in enumerate(zip(tensors, params))
        if t.stride() != p.stride() and not (t.is_contiguous() and p.is_contiguous())
    ]  # fmt: skip


def check_adam(lr: object, betas: Any, eps: object, weight_decay: object) -> tuple[float, Adam]:
    """Checks the numbers of a step.

    Raises:
        TypeError: not numbers.
        ValueError: a negative one, or a beta outside of [0, 1).
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: got {betas!r}, expected two numbers")
    numbers = {name: check_number(name, n) for name, n in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay))}
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name}: got {number}, expected at least 0")
    beta1, beta2 = (check_number("betas", beta) for beta in betas)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas: got {tuple(betas)}, expected both in [0, 1)")
    return numbers["lr"], Adam(beta1, beta2, numbers["eps"], numbers["weight_decay"])


def check_vector(
    name: str, value: Any, size: int, params: Sequence[Tensor], dtypes: Sequence[torch.dtype] = DTYPES
) -> Tensor:
    """Checks ``[size]`` numbers on the parameters' device."""
    return check_tensor(name, value, (size,), dtypes=dtypes, like=("params[0]", params[0]), same_dtype=False)


def check_scalar(name: str, value: Any, default: float | bool, params: Sequence[Tensor]) -> Tensor:
    """Checks a tensor of one number, or of one truth value, on the parameters' device; ``None`` is ``default``."""
    dtypes = (torch.bool,) if isinstance(default, bool) else DTYPES
    if value is None:
        return torch.full((), default, dtype=dtypes[0], device=params[0].device)
    check_tensor(name, value, dtypes=dtypes, like=("params[0]", params[0]), same_dtype=False)
    if value.numel() != 1:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected one element")
    return value.reshape(())
