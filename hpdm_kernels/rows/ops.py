"""The registered ops behind :mod:`hpdm_kernels.rows.api`: schemas, shapes for tracing, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._backend import autocast_off, custom_op
from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.rows import torch_backend, triton_backend


def _of(backend: str) -> Any:
    return triton_backend if backend == "triton" else torch_backend


# ---- modulated norm, alone and after a residual connection. Lists of results would take longer than tuples. ----


@custom_op("modulated_norm_fwd")
def modulated_norm_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``out [B, N, D]``, and ``mean`` and ``rstd [B, N]`` in fp32, or in fp64 for fp64.

    ``x`` is ``[B, N, D]``, ``shift`` and ``scale`` are ``[B, D]``; ``rstd`` is one divided by the standard deviation.
    """
    with torch.cuda.device_of(x), autocast_off(x):
        _, *results = _of(backend).norm_forward(x, None, None, shift, scale, eps)
    return tuple(results)


@modulated_norm_fwd.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _statistics(x), _statistics(x)


@custom_op("residual_norm_fwd")
def residual_norm_fwd(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y = x + gate * branch`` and, of ``y``, what :func:`modulated_norm_fwd` returns.

    ``branch`` is ``[B, N, D]``, ``gate`` is ``[B, D]``; without it the factor is 1.
    """
    with torch.cuda.device_of(x), autocast_off(x):
        return _of(backend).norm_forward(x, branch, gate, shift, scale, eps)


@residual_norm_fwd.register_fake
def _(
    x: Tensor, branch: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _statistics(x), _statistics(x)


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=coordinate_dtype(x.dtype))


@custom_op("modulated_norm_bwd")
def modulated_norm_bwd(
    grad_y: Tensor | None,
    grad: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    backend: str,
) -> list[Tensor]:
    """Gradients of ``x``, ``shift`` and ``scale``, and with a gate those of ``branch`` and ``gate``.

    ``grad_y`` is the gradient of ``y`` from elsewhere, ``grad`` that of ``out``, both ``[B, N, D]``.
    """
    with torch.cuda.device_of(y), autocast_off(y):
        return _of(backend).norm_backward(grad_y, grad, y, mean, rstd, shift, scale, branch, gate)


@modulated_norm_bwd.register_fake
def _(
    grad_y: Tensor | None, grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor,
    branch: Tensor | None, gate: Tensor | None, backend: str,
) -> list[Tensor]:  # fmt: skip
    gradients = [y.new_empty(y.shape), shift.new_empty(shift.shape), scale.new_empty(scale.shape)]
    if branch is not None and gate is not None:
        gradients += [branch.new_empty(branch.shape), gate.new_empty(gate.shape)]
    return gradients


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, shift, scale)


def _backward_norm(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dshift, dscale = modulated_norm_bwd(None, grad, *ctx.saved_tensors, None, None, ctx.backend)
    return dx, dshift, dscale, None, None


modulated_norm_fwd.register_autograd(_backward_norm, setup_context=_setup_norm)


def _setup_residual_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, _, ctx.backend = inputs
    y, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.branch_dtype = branch.dtype
    # Without a gate the branch is not needed: its gradient is that of x.
    kept = (branch, gate) if gate is not None else (None, None)
    ctx.save_for_backward(y, mean, rstd, shift, scale, *kept)


def _backward_residual_norm(ctx: Any, grad_y: Tensor, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, dshift, dscale, *gated = modulated_norm_bwd(grad_y, grad, *ctx.saved_tensors, ctx.backend)
    dbranch, dgate = gated or (dx.to(ctx.branch_dtype), None)
    return dx, dbranch, dgate, dshift, dscale, None, None


residual_norm_fwd.register_autograd(_backward_residual_norm, setup_context=_setup_residual_norm)


# ---- gated residual ----


@custom_op("gated_residual_fwd")
def gated_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> Tensor:
    """``x + gate * branch``, of ``[B, N, D]`` twice and ``[B, D]``. PyTorch does this in one pass on every backend."""
    with autocast_off(x):
        return torch.addcmul(x, branch, gate[:, None]).to(x.dtype)


@gated_residual_fwd.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("gated_residual_bwd")
def gated_residual_bwd(grad: Tensor, branch: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``branch [B, N, D]`` and ``gate [B, D]``, from ``grad [B, N, D]``, which is that of ``x``."""
    with torch.cuda.device_of(grad), autocast_off(grad):
        return _of(backend).residual_backward(grad, branch, gate)


@gated_residual_bwd.register_fake
def _(grad: Tensor, branch: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


def _setup_residual(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, gate, ctx.backend = inputs
    ctx.save_for_backward(branch, gate)


def _backward_residual(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not any(ctx.needs_input_grad[1:3]):
        return grad, None, None, None
    return (grad, *gated_residual_bwd(grad, *ctx.saved_tensors, ctx.backend), None)


gated_residual_fwd.register_autograd(_backward_residual, setup_context=_setup_residual)


# ---- GELU ----


@custom_op("bias_gelu_fwd")
def bias_gelu_fwd(x: Tensor, bias: Tensor, backend: str) -> Tensor:
    """``gelu(x + bias)``, of ``[R, D]`` and ``[D]``."""
    with torch.cuda.device_of(x), autocast_off(x):
        return _of(backend).gelu_forward(x, bias)


@bias_gelu_fwd.register_fake
def _(x: Tensor, bias: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("bias_gelu_bwd")
def bias_gelu_bwd(grad: Tensor, x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [R, D]`` and ``bias [D]``, from ``grad [R, D]``."""
    with torch.cuda.device_of(x), autocast_off(x):
        return _of(backend).gelu_backward(grad, x, bias)


@bias_gelu_bwd.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _setup_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


def _backward_gelu(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*bias_gelu_bwd(grad, *ctx.saved_tensors, ctx.backend), None)


bias_gelu_fwd.register_autograd(_backward_gelu, setup_context=_setup_gelu)
