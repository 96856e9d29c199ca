"""The registered ops behind :mod:`hpdm_kernels.groupnorm.api`: schemas, shapes for tracing, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hpdm_kernels._backend import autocast_off, custom_op
from hpdm_kernels.boxes import coordinate_dtype
from hpdm_kernels.groupnorm import torch_backend, triton_backend
from hpdm_kernels.groupnorm.form import Form


def _of(backend: str) -> Any:
    return triton_backend if backend == "triton" else torch_backend


@custom_op("group_norm_act_fwd")
def group_norm_act_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    per_clip: bool,
    silu: bool,
    pad: list[int],
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``out [B, T', H', W', C]``, and ``mean`` and ``rstd [B, S, G]`` in fp32, or in fp64 for fp64.

    ``x`` is ``[B, T, H, W, C]``, ``weight`` and ``bias`` are ``[C]``, ``scale`` and ``shift`` ``[B, 1 or T, C]``; ``S``
    is 1 for statistics of clips, else T; ``rstd`` is one divided by the standard deviation. The rest is as of
    :class:`~hpdm_kernels.groupnorm.form.Form`.
    """
    with torch.cuda.device_of(x), autocast_off(x):
        return _of(backend).forward(x, weight, bias, scale, shift, Form(groups, per_clip, silu, pad), eps)


@group_norm_act_fwd.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None, groups: int, per_clip: bool,
    silu: bool, pad: list[int], eps: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = Form(groups, per_clip, silu, pad)
    statistics = [x.new_empty(form.statistics(x.shape), dtype=coordinate_dtype(x.dtype)) for _ in range(2)]
    return x.new_empty(form.padded(x.shape)), statistics[0], statistics[1]


@custom_op("group_norm_act_bwd")
def group_norm_act_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    per_clip: bool,
    silu: bool,
    pad: list[int],
    backend: str,
) -> list[Tensor]:
    """Gradients of ``x``, ``weight`` and ``bias``, and with a modulation those of ``scale`` and ``shift``.

    ``grad`` is that of ``out``, ``[B, T', H', W', C]``.
    """
    with torch.cuda.device_of(x), autocast_off(x):
        form = Form(groups, per_clip, silu, pad)
        return _of(backend).backward(grad, x, mean, rstd, weight, bias, scale, shift, form)


@group_norm_act_bwd.register_fake
def _(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
    shift: Tensor | None, groups: int, per_clip: bool, silu: bool, pad: list[int], backend: str,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in (x, weight, bias, scale, shift) if t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, scale, shift, *ctx.settings, _, ctx.backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = group_norm_act_bwd(grad, *ctx.saved_tensors, *ctx.settings, ctx.backend)
    return (*gradients, *[None] * (11 - len(gradients)))


group_norm_act_fwd.register_autograd(_backward, setup_context=_setup)
