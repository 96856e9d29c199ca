"""Ops on rows in PyTorch's own operations, in pieces that fit into the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype

PIECE = 1 << 17
"""About how many elements are worked on at once: four tensors of that size in fp32 are 2 MB."""


def norm_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y, out, mean, rstd``, where ``y`` is ``x`` without a branch; see :mod:`hpdm_kernels.rows.ops`."""
    work = coordinate_dtype(x.dtype)
    y = x if branch is None else _new(x)
    out = _new(x)
    mean, rstd = (torch.empty(x.shape[:2], dtype=work, device=x.device) for _ in range(2))
    gain, offset = 1 + scale.to(work), shift.to(work)
    for s, r in _pieces(x):
        if branch is not None:
            if gate is None:
                torch.add(x[s, r], branch[s, r], out=y[s, r])
            else:
                torch.addcmul(x[s, r], branch[s, r], gate[s, None], out=y[s, r])
        rows = y[s, r].to(work)
        normal, mean[s, r, None], rstd[s, r, None] = torch.native_layer_norm(rows, rows.shape[2:], None, None, eps)
        torch.addcmul(offset[s, None], normal, gain[s, None], out=out[s, r])
    return y, out, mean, rstd


def norm_backward(
    grad_y: Tensor | None, grad: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, shift: Tensor, scale: Tensor,
    branch: Tensor | None, gate: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients; see :func:`hpdm_kernels.rows.ops.modulated_norm_bwd`."""
    work = mean.dtype
    gain = 1 + scale.to(work)
    dx, dshift, dscale = _new(y), torch.zeros_like(gain), torch.zeros_like(gain)
    gated = branch is not None and gate is not None
    dbranch, dgate = (_new(branch), torch.zeros_like(gain)) if branch is not None and gated else (dx, dshift)
    for s, r in _pieces(y):
        above, rows = grad[s, r].to(work), y[s, r].to(work)
        center, inverse = mean[s, r, None], rstd[s, r, None]
        if len(rows) == 1:
            # The modulation of one sample is an affine layer norm, whose gradients PyTorch computes together.
            inner, sums_of_scale, sums_of_shift = torch.ops.aten.native_layer_norm_backward(
                above, rows, rows.shape[2:], center, inverse, gain[s].flatten(), shift[s].flatten().to(work), [True] * 3
            )
        else:
            sums_of_shift, sums_of_scale = above.sum(1), ((rows - center) * inverse).mul_(above).sum(1)
            inner = torch.ops.aten.native_layer_norm_backward(
                above * gain[s, None], rows, rows.shape[2:], center, inverse, None, None, [True, False, False]
            )[0]
        dshift[s] += sums_of_shift
        dscale[s] += sums_of_scale
        if grad_y is not None:
            inner = inner.add_(grad_y[s, r])
        dx[s, r] = inner
        if branch is not None and gate is not None:
            torch.mul(inner, gate[s, None].to(work), out=dbranch[s, r])
            dgate[s] += inner.mul_(branch[s, r].to(work)).sum(1)
    gradients = [dx, dshift.to(shift.dtype), dscale.to(scale.dtype)]
    return [*gradients, dbranch, dgate.to(gate.dtype)] if gate is not None and gated else gradients


def residual_backward(grad: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``branch [B, N, D]`` and ``gate [B, D]``, from ``grad [B, N, D]``."""
    work = coordinate_dtype(branch.dtype)
    dbranch, dgate = _new(branch), torch.zeros(gate.shape, dtype=work, device=gate.device)
    wide = gate.to(work)
    for s, r in _pieces(grad):
        rows = grad[s, r].to(work)
        torch.mul(rows, wide[s, None], out=dbranch[s, r])
        dgate[s] += (rows * branch[s, r].to(work)).sum(1)
    return dbranch, dgate.to(gate.dtype)


def gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)``, of ``[R, D]`` and ``[D]``."""
    out = _new(x)
    wide = bias.to(coordinate_dtype(x.dtype))
    for source, piece in zip(_chunks(x), _chunks(out)):
        piece.copy_(torch.ops.aten.gelu_(source + wide, approximate="tanh"))
    return out


def gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x [R, D]`` and ``bias [D]``, from ``grad [R, D]``."""
    dx = _new(x)
    wide = bias.to(coordinate_dtype(x.dtype))
    dbias = torch.zeros_like(wide)
    for source, above, piece in zip(_chunks(x), _chunks(grad), _chunks(dx)):
        rows = torch.ops.aten.gelu_backward(above.to(wide.dtype), source + wide, approximate="tanh")
        dbias += rows.sum(0)
        piece.copy_(rows)
    return dx, dbias.to(bias.dtype)


def _new(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _pieces(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of samples and rows of ``[B, N, D]``, about :data:`PIECE` elements each: whole samples if small."""
    batch, rows, width = x.shape
    samples = max(PIECE // (rows * width), 1)
    step = rows if rows * width <= PIECE else max(PIECE // width, 1)
    for b in range(0, batch, samples):
        for n in range(0, rows, step):
            yield slice(b, b + samples), slice(n, n + step)


def _chunks(t: Tensor) -> tuple[Tensor, ...]:
    """``t [R, D]`` in pieces of rows, about :data:`PIECE` elements each."""
    return t.split(max(PIECE // t.shape[1], 1))
