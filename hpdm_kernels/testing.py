"""How the project measures error: against an fp64 oracle, in units of the plain implementation's own error.

A fixed tolerance either hides a bug at small magnitudes or fails for honest rounding at large ones. So an op is right
when its error is at most ``factor`` times that of the plain implementation in the same dtype on the same inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, measured in fp64; infinite if ``actual`` has a NaN where the oracle has none."""
    difference = (actual.double() - oracle.double()).abs()
    if difference.numel() == 0:
        return 0.0
    worst = difference.max().item()
    return float("inf") if worst != worst else worst


def assert_within_budget(
    name: str, actual: Tensor, plain: Tensor, oracle: Tensor, *, factor: float = 2.0, ulps: float | None = None
) -> None:
    """Fails unless ``actual`` errs at most ``factor`` times as much as ``plain`` against ``oracle``.

    Args:
        name: what is compared, for the message.
        actual: the result under test.
        plain: the plain implementation's result, same dtype and inputs.
        oracle: the fp64 result.
        factor: allowed multiple of the plain implementation's largest error.
        ulps: allowance for when the plain error is zero by luck: this many units in the last place of the largest
            value of the oracle. 4 if not given; 64 in fp64, where the plain implementation is its own oracle, so that
            this is the whole budget.
    """
    if actual.shape != oracle.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    if actual.dtype != plain.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {plain.dtype}")
    scale = oracle.abs().max().item() if oracle.numel() else 0.0
    if ulps is None:
        ulps = 64.0 if actual.dtype is torch.float64 else 4.0
    budget = factor * max_error(plain, oracle) + ulps * torch.finfo(actual.dtype).eps * scale
    error = max_error(actual, oracle)
    if not error <= budget:
        raise AssertionError(f"{name}: error {error:.3e} exceeds the budget {budget:.3e} (largest value {scale:.3e})")


def value_and_grads(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad_output: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """``fn(*inputs)`` and the gradients of every floating input, ``None`` for the others.

    The inputs are detached and made leaves *without* a copy, so strides are kept.
    """
    leaves = [t.detach().requires_grad_(t.is_floating_point()) if isinstance(t, Tensor) else t for t in inputs]
    out = fn(*leaves)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    grad_output = torch.ones_like(out) if grad_output is None else grad_output.to(out.dtype)
    grads = iter(torch.autograd.grad(out, wanted, grad_output, allow_unused=True))
    return out.detach(), [next(grads) if isinstance(t, Tensor) and t.requires_grad else None for t in leaves]


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fills every ``torch.empty`` with NaN inside the block, so that reading what was never written shows."""
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
        low, room = torch.zeros(rows, 3), 1.0 - size
    else:
        low, room = inside[:, :3], inside[:, 3:] - size
    offset = low + torch.rand(rows, 3, generator=generator) * room.clamp(min=0)
    return torch.cat((offset, size), dim=1)
