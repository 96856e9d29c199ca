"""Measures errors against an fp64 oracle, relative to the error of the plain implementation.

A fixed tolerance hides bugs at small magnitudes or rejects ordinary rounding at large ones. So an op passes if its
error is at most ``factor`` times that of the plain implementation in the same dtype on the same inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def largest(t: Tensor) -> float:
    """Largest absolute value, 0 of no elements."""
    return t.abs().max().item() if t.numel() else 0.0


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, measured in fp64; infinite if ``actual`` has a NaN where the oracle has none."""
    difference = (actual.double() - oracle.double()).abs()
    if difference.numel() == 0:
        return 0.0
    worst = difference.max().item()
    return float("inf") if worst != worst else worst


def rms_error(actual: Tensor, oracle: Tensor) -> float:
    """Root mean square of the difference, measured in fp64; NaN if ``actual`` has a NaN where the oracle has none."""
    return (actual.double() - oracle.double()).square().mean().sqrt().item() if oracle.numel() else 0.0


def _measure(
    name: str,
    actual: Tensor,
    plain: Tensor,
    oracle: Tensor,
    factor: float,
    ulps: float | None,
    rms_factor: float | None = None,
    size: float = 0.0,
) -> tuple[float, str | None]:
    """The error of ``actual`` as a multiple of its budget, and a description of the problem, or ``None``.

    The multiple is infinite if ``actual`` has the wrong shape or dtype, or a NaN.
    """
    if actual.shape != oracle.shape:
        return float("inf"), f"{name}: got shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if actual.dtype != plain.dtype:
        return float("inf"), f"{name}: got dtype {actual.dtype}, expected {plain.dtype}"
    scale = max(size, largest(oracle))
    if ulps is None:
        ulps = 64.0 if actual.dtype is torch.float64 else 4.0
    slack = ulps * torch.finfo(actual.dtype).eps * scale
    worst, problem = 0.0, None
    for kind, measure, multiple in (("error", max_error, factor), ("rms error", rms_error, rms_factor)):
        if multiple is None:
            continue
        budget, error = multiple * measure(plain, oracle) + slack, measure(actual, oracle)
        share = error / budget if budget else (0.0 if error == 0.0 else float("inf"))
        if not error <= budget and problem is None:
            problem = f"{name}: {kind} {error:.3e} exceeds the budget {budget:.3e} (scale {scale:.3e})"
        worst = max(worst, share)
    return worst, problem


def assert_within_budget(
    name: str,
    actual: Tensor,
    plain: Tensor,
    oracle: Tensor,
    *,
    factor: float = 2.0,
    ulps: float | None = None,
    size: float = 0.0,
) -> float:
    """Fails unless the error of ``actual`` is at most ``factor`` times that of ``plain``, both against ``oracle``.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        plain: the plain implementation's result, same dtype and inputs.
        oracle: the fp64 result.
        factor: allowed multiple of the plain implementation's largest error.
        ulps: added to the budget, in units in the last place of the oracle's largest value, because the plain
            implementation's error may happen to be zero. Default 4; 64 in fp64, where the plain implementation equals
            the oracle, so that this is the whole budget.
        size: largest sum of absolute terms of the result; ``ulps`` count relative to it where it exceeds the oracle,
            whose few elements may all be what cancelling leaves.

    Returns:
        The error as a share of the budget, 0 to 1.
    """
    share, problem = _measure(name, actual, plain, oracle, factor, ulps, size=size)
    if problem:
        raise AssertionError(problem)
    return share


def value_and_grads(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_output: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """``fn(*inputs)`` and the gradients of every floating-point input, ``None`` for the others.

    The inputs are detached and made leaves *without* a copy, so strides are kept. The default ``grad_output`` is ones.
    """
    leaves = [t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in inputs]
    out = fn(*leaves)
    differentiable = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    grad_output = torch.ones_like(out) if grad_output is None else grad_output.to(out.dtype)
    grads = iter(torch.autograd.grad(out, differentiable, grad_output, allow_unused=True))
    return out.detach(), [next(grads) if isinstance(t, Tensor) and t.requires_grad else None for t in leaves]


class Comparison(NamedTuple):
    """Result of :func:`compare_op`."""

    share: float
    """The largest error as a multiple of its budget; above 1 the comparison fails."""
    same_bits: bool | None
    """Whether two runs gave the same bits; ``None`` if there was one run."""
    problem: str | None
    """Description of the first problem, ``None`` if there is none."""


ValueAndGrads = Callable[
    [Callable[..., Tensor], Sequence[Tensor | None], Tensor | None], tuple[Tensor, list[Tensor | None]]
]


def compare_op(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor | None = None,
    *,
    factor: float = 2.0,
    ulps: float | None = None,
    rms_factor: float | None = None,
    repeat: bool = False,
    products: bool = False,
    names: Sequence[str] = (),
    plain: ValueAndGrads = value_and_grads,
) -> Comparison:
    """Measures the output and every gradient of ``ours`` against the budget of :func:`assert_within_budget`.

    The oracle is ``formula`` on the inputs in fp64, the plain implementation ``formula`` on the inputs in their dtype.
    Memory that ``ours`` allocates is filled with NaN first, to reveal elements that no kernel writes.

    Args:
        ours: the op under test, called on ``inputs``.
        formula: the plain implementation, called on the same inputs.
        inputs: tensors of any strides; all floating-point ones get gradients. ``None`` for an optional input.
        grad: gradient of the output, of its shape and of any strides; drawn from a normal distribution if not given.
        factor, ulps: see :func:`assert_within_budget`.
        rms_factor: allowed multiple of the root mean square of the plain implementation's errors; ``None``: any.
        repeat: run ``ours`` a second time, which must give the same bits.
        products: the op sums products of its inputs, and ``ulps`` are relative to the sums of their absolute values;
            for results of so few elements that all of them may be what cancelling leaves.
        names: names of the inputs, for messages; by default their indices.
        plain: computes the plain results from ``(formula, inputs, grad)``; for products in an arithmetic that PyTorch
            has no setting for.
    """
    if grad is None:
        with torch.no_grad():
            grad = torch.randn_like(formula(*inputs))
    wide = [t.detach().double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    oracle, oracle_grads = value_and_grads(formula, wide, grad.double())
    terms, terms_grads = oracle, oracle_grads
    if products:
        sizes = [t.abs() if isinstance(t, Tensor) and t.is_floating_point() else t for t in wide]
        terms, terms_grads = value_and_grads(formula, sizes, grad.double().abs())
    expected, expected_grads = plain(formula, inputs, grad)
    with poisoned_allocations():
        actual, actual_grads = value_and_grads(ours, inputs, grad)
        second, second_grads = value_and_grads(ours, inputs, grad) if repeat else (actual, actual_grads)
    labels = ["output", *(f"gradient of {names[i] if names else f'input {i}'}" for i in range(len(inputs)))]
    results = (
        (actual, actual_grads), (expected, expected_grads), (oracle, oracle_grads), (second, second_grads),
        (terms, terms_grads),
    )  # fmt: skip
    problems: list[str] = []
    worst, same_bits = 0.0, True
    for label, *row in zip(labels, *([out, *grads] for out, grads in results), strict=True):
        ours_value, plain_value, true_value, repeated, term = row
        if (ours_value is None) != (true_value is None):
            has = "no gradient, expected one" if ours_value is None else "a gradient, expected none"
            worst, problems = float("inf"), [*problems, f"{label}: got {has}"]
        if ours_value is None or plain_value is None or true_value is None or repeated is None:
            continue
        share, problem = _measure(label, ours_value, plain_value, true_value, factor, ulps, rms_factor, largest(term))
        worst = max(worst, share)
        problems += [problem] if problem else []
        if not torch.equal(ours_value, repeated):
            same_bits = False
            problems.append(f"{label}: two runs differ")
    return Comparison(worst, same_bits if repeat else None, problems[0] if problems else None)


def check_op(
    ours: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    grad: Tensor | None = None,
    *,
    factor: float = 2.0,
    ulps: float | None = None,
    repeat: bool = False,
    products: bool = False,
    names: Sequence[str] = (),
) -> float:
    """Fails if :func:`compare_op`, which documents the arguments, reports a problem.

    Returns:
        The largest error as a share of its budget, 0 to 1.
    """
    comparison = compare_op(
        ours, formula, inputs, grad, factor=factor, ulps=ulps, repeat=repeat, products=products, names=names
    )
    if comparison.problem:
        raise AssertionError(comparison.problem)
    return comparison.share


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills every ``torch.empty`` with NaN inside the block, to reveal reads of uninitialized memory."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = was_filling  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(was_on, warn_only=was_warning)


def random_boxes(rows: int, scale: Sequence[float], generator: torch.Generator, inside: Tensor | None = None) -> Tensor:
    """``[rows, 6]`` boxes of the given scale (three fractions) at uniform offsets inside ``inside`` (or the video)."""
    size = torch.tensor(scale, dtype=torch.float32).expand(rows, 3)
    if inside is None:
        low, room = torch.zeros_like(size), 1.0 - size
    else:
        low, room = inside[:, :3], inside[:, 3:] - size
    offset = low + torch.rand(rows, 3, generator=generator, dtype=torch.float32) * room.clamp(min=0)
    return torch.cat((offset, size), dim=1)
