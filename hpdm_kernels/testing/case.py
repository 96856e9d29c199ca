"""A configuration of an op: arguments, the formula to compare with, and the error that rounding may cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = dict[str, Any]


class Case(NamedTuple):
    """One call of a public function, and how to judge its results."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    """The op; it also takes ``backend``."""
    formula: Callable[..., Tensor | tuple[Tensor, ...]]
    """The same by other means, for the same arguments."""
    arguments: Arguments
    """Keyword arguments, without ``backend``."""
    differentiable: tuple[str, ...]
    """Names of the tensors, and tuples of tensors, that get gradients."""
    ulps: float
    """Allowed error in units in the last place of the result's dtype, relative to the terms that the result sums."""
    fine_ulps: float = 0.0
    """The same in units of fp32, or of fp64 for fp64: for what is computed in these whatever the dtype."""
    sizes: Callable[[Arguments, Sequence[Tensor]], list[float]] | None = None
    """The largest sum of absolute terms of each output and gradient, from arguments and gradients in fp64.

    ``None``: what the formula gives for absolute values, as is right for sums of products.
    """


def leaves(arguments: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    """The tensors called ``names``, one after the other; missing ones (``None``) are left out."""
    values = [arguments[name] for name in names]
    flat = [t for value in values for t in (value if isinstance(value, tuple) else (value,))]
    return [t for t in flat if t is not None]


def replaced(arguments: Mapping[str, Any], names: Sequence[str], tensors: Sequence[Tensor]) -> Arguments:
    """``arguments`` with the tensors of :func:`leaves` exchanged for ``tensors``."""
    rest = iter(tensors)
    changed = dict(arguments)
    for name in names:
        value = arguments[name]
        if isinstance(value, tuple):
            changed[name] = tuple(next(rest) for _ in value)
        elif value is not None:
            changed[name] = next(rest)
    return changed


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results of an op that returns one tensor or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def evaluate(
    function: Callable[..., Any],
    arguments: Arguments,
    differentiable: Sequence[str],
    wanted: Sequence[bool],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    """Results of ``function``, and the gradients of those of :func:`leaves` that are ``wanted``.

    The tensors become leaves without a copy, so that their strides are kept.
    """
    tensors = [
        t.detach().requires_grad_(w) if w else t for t, w in zip(leaves(arguments, differentiable), wanted, strict=True)
    ]
    outputs = as_tuple(function(**replaced(arguments, differentiable, tensors)))
    inputs = [t for t, w in zip(tensors, wanted) if w]
    results = [out.detach() for out in outputs]
    if not inputs:
        return results
    tracked = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    return results + list(torch.autograd.grad([out for out, _ in tracked], inputs, [grad for _, grad in tracked]))


def widened(arguments: Mapping[str, Any], change: Callable[[Tensor], Tensor]) -> Arguments:
    """``arguments`` with ``change`` applied to all floating-point tensors but boxes, whose values are exact."""

    def convert(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(convert(name, v) for v in value)
        if isinstance(value, Tensor) and value.is_floating_point() and "box" not in name:
            return change(value)
        return value

    return {name: convert(name, value) for name, value in arguments.items()}


def sizes_of(case: Case, arguments: Arguments, wanted: Sequence[bool], grads: Sequence[Tensor]) -> list[float]:
    """:attr:`Case.sizes` of fp64 ``arguments`` and ``grads``, for the results that :func:`evaluate` lists."""
    if case.sizes is not None:
        sizes = case.sizes(arguments, grads)
        outputs = len(grads)
        return sizes[:outputs] + [size for size, w in zip(sizes[outputs:], wanted, strict=True) if w]
    positive = widened(arguments, torch.Tensor.abs)
    positive |= {name: abs(positive[name]) for name in ("alpha", "beta") if name in positive}
    results = evaluate(case.formula, positive, case.differentiable, wanted, [g.abs() for g in grads])
    return [t.abs().max().item() for t in results]
