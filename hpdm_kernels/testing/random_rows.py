"""Random configurations of the ops on rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import hpdm_kernels
from hpdm_kernels.testing import formulas
from hpdm_kernels.testing.case import Arguments, Case
from hpdm_kernels.testing.draw import Draw

_MIXED = (torch.float32, torch.bfloat16, torch.float16)


def _shape(draw: Draw) -> tuple[int, int, int]:
    return draw.size(4), draw.rows(40), draw.rows(90)


def _other(draw: Draw, dtype: torch.dtype, backend: str) -> torch.dtype:
    """The dtype of what stands beside rows of ``dtype``: in a fifth of all cases another one, as under autocast."""
    return draw.choose(_MIXED) if backend != "triton" and dtype in _MIXED and draw.chance(0.2) else dtype


def modulated_norm(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.modulated_norm`: alone, after a branch, after a gated one."""
    b, n, d = _shape(draw)
    other = _other(draw, dtype, backend)
    vectors = {name: draw.normal(b, d, dtype=other) for name in ("shift", "scale", "gate")}
    branch, gate = None, None
    if draw.chance(0.6):
        branch = draw.normal(b, n, d, dtype=other)
        gate = vectors["gate"] if draw.chance(0.6) else None
    arguments = {
        "x": draw.normal(b, n, d, dtype=dtype), "shift": vectors["shift"], "scale": vectors["scale"],
        "branch": branch, "gate": gate, "eps": draw.choose((1e-5, 1e-6, 0.1)),
    }  # fmt: skip
    names = ("x", "shift", "scale", "branch", "gate")
    return Case(hpdm_kernels.modulated_norm, formulas.modulated_norm, arguments, names, 16.0, 16.0, _sizes_of_norm)


def _sizes_of_norm(arguments: Arguments, grads: Sequence[Tensor]) -> list[float]:
    """Terms of a norm: rows minus their mean, divided by their deviation, which is small for rows that vary little."""
    x, branch, gate = (arguments[name] for name in ("x", "branch", "gate"))
    scaled = 0.0 if branch is None else branch if gate is None else gate[:, None] * branch
    y = x + scaled
    largest = max(y.abs().max().item(), x.abs().max().item(), abs(scaled).max().item() if branch is not None else 0.0)
    inverse = (y.var(dim=2, correction=0) + arguments["eps"]).rsqrt().max().item()
    gain, shift = 1 + arguments["scale"].abs().max().item(), arguments["shift"].abs().max().item()
    normal = 2 * largest * inverse
    *above, grad = [g.abs().max().item() for g in grads]
    rows = y.shape[1]
    dx = inverse * grad * gain * (2 + normal) * (1 + normal) + sum(above)
    sizes = [largest] * len(above) + [normal * gain + shift, dx, rows * grad, rows * grad * normal]
    if branch is not None:
        sizes.append(dx * (1 if gate is None else gate.abs().max().item()))
    return sizes if gate is None else [*sizes, rows * dx * branch.abs().max().item()]


def gated_residual(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.gated_residual`."""
    b, n, d = _shape(draw)
    other = _other(draw, dtype, backend)
    arguments = {
        "x": draw.normal(b, n, d, dtype=dtype), "branch": draw.normal(b, n, d, dtype=other),
        "gate": draw.normal(b, d, dtype=other),
    }  # fmt: skip
    return Case(hpdm_kernels.gated_residual, formulas.gated_residual, arguments, ("x", "branch", "gate"), 4.0)


def bias_gelu(draw: Draw, dtype: torch.dtype, backend: str) -> Case:
    """A configuration of :func:`hpdm_kernels.bias_gelu`."""
    b, n, d = _shape(draw)
    arguments = {"x": draw.normal(b, n, d, dtype=dtype), "bias": draw.normal(d, dtype=_other(draw, dtype, backend))}
    return Case(hpdm_kernels.bias_gelu, formulas.bias_gelu, arguments, ("x", "bias"), 4.0, 4.0, _sizes_of_gelu)


def _sizes_of_gelu(arguments: Arguments, grads: Sequence[Tensor]) -> list[float]:
    largest = (arguments["x"].abs().max() + arguments["bias"].abs().max()).item()
    # The derivative of GELU is at most 1.13, the terms of its formula a few times that.
    b, n, _ = arguments["x"].shape
    slope = 4 * grads[0].abs().max().item()
    return [largest, slope, slope * b * n]
