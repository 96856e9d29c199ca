"""Ops on rows of channels that stand between the products of a block (adaLN, Peebles and Xie 2023, section 3.2).

    y   = x + gate * branch
    out = (y - mean(y)) / sqrt(var(y) + eps) * (1 + scale) + shift          modulated_norm
    y   = x + gate * branch                                                 gated_residual
    out = gelu(x + bias)                                                    bias_gelu

``x``, ``branch`` and the results are ``[B, N, D]``; ``gate``, ``scale`` and ``shift`` are ``[B, D]``, one vector for
all N rows of a sample; mean and variance are those of a row. Written with PyTorch's operations, a norm with its
modulation and the residual before it reads and writes the rows four times forward and a dozen times backward. Here each
is one pass in each direction. The gradients of vectors are sums over rows: every program sums its rows, and a second
step adds the programs' sums, always in the same order. There are no atomics, so every run gives the same bits.
"""

from __future__ import annotations

from typing import overload

from torch import Tensor

from hpdm_kernels import _transforms, reference
from hpdm_kernels._backend import autocast_off, resolve
from hpdm_kernels._checks import check_number, check_tensor, values_are_readable
from hpdm_kernels.rows.ops import bias_gelu_fwd, gated_residual_fwd, modulated_norm_fwd, residual_norm_fwd

WIDEST = 4096
"""The largest width of a row that is normed: a program keeps whole rows in registers."""
LEAST = 1 << 19
"""Elements of ``x`` below which ``"torch"`` calls PyTorch's own layers on the CPU: the rows are in its cache, and the
calls of a registered op cost more than its fewer passes save."""


@overload
def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, branch: None = None, gate: None = None, *, eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor: ...  # fmt: skip
@overload
def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor, gate: Tensor | None = None, *, eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm of ``x`` or of ``x + gate * branch``, scaled by ``1 + scale`` and shifted, vectors per sample.

    Args:
        x: rows ``[B, N, D]``, fp16, bf16, fp32 or fp64, ``D`` at most 4,096.
        shift, scale: ``[B, D]``.
        branch: ``[B, N, D]``, the result of the layer whose residual connection ends here.
        gate: ``[B, D]``, factor of the branch; ``None`` for 1. Only with a branch.
        eps: added to the variance, greater than 0.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    All tensors but ``x`` may have any of the four dtypes, as under autocast, where the results of products have 16 bits
    and ``x`` has not. Every tensor gets a gradient of its dtype.

    Returns:
        ``out [B, N, D]`` of ``x``'s dtype, or with a branch ``(y, out)``, where ``y = x + gate * branch``. A NaN or
        infinity in a row makes this row not finite, one in a vector its column of the sample or all of the sample.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, a gate without a branch, an ``eps`` that is not positive, rows that are too
            wide, an unknown backend.
        RuntimeError: ``backend="triton"`` cannot run here.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.
    """
    x = check_tensor("x", x, ("B", "N", "D"))
    if x.shape[2] > WIDEST:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at most {WIDEST} channels")
    for name, vector in (("shift", shift), ("scale", scale), ("gate", gate)):
        if vector is not None or name != "gate":
            check_tensor(name, vector, (x.shape[0], x.shape[2]), like=("x", x), same_dtype=False)
    if branch is not None:
        check_tensor("branch", branch, x.shape, like=("x", x), same_dtype=False)
    elif gate is not None:
        raise ValueError("gate: got a tensor, expected None without a branch")
    eps = check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected a number > 0")
    chosen = _resolve(backend, "modulated_norm", x, shift, scale, branch, gate)
    if chosen == "reference":
        with autocast_off(x):
            return reference.modulated_norm(x, shift, scale, branch, gate, eps)
    if branch is None:
        return modulated_norm_fwd(x, shift, scale, eps, chosen)[0]
    return residual_norm_fwd(x, branch, gate, shift, scale, eps, chosen)[:2]


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """``x + gate * branch``, the end of a residual connection with a gate per sample and channel.

    Args:
        x: rows ``[B, N, D]``, fp16, bf16, fp32 or fp64.
        branch: ``[B, N, D]``, of any of these dtypes.
        gate: ``[B, D]``, of any of these dtypes.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, N, D]`` of ``x``'s dtype. Every tensor gets a gradient of its dtype.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :func:`modulated_norm`; rows may be of any width.
    """
    x = check_tensor("x", x, ("B", "N", "D"))
    check_tensor("branch", branch, x.shape, like=("x", x), same_dtype=False)
    check_tensor("gate", gate, (x.shape[0], x.shape[2]), like=("x", x), same_dtype=False)
    chosen = _resolve(backend, "gated_residual", x, branch, gate)
    if chosen == "reference":
        with autocast_off(x):
            return reference.gated_residual(x, branch, gate)
    return gated_residual_fwd(x, branch, gate, chosen)


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU of ``x + bias`` by its tanh formula (Hendrycks and Gimpel 2016, section 2), for products without a bias.

    The bias belongs here, because its gradient is a sum over rows of what the gradient of GELU writes: computed in the
    same pass it costs no reading.

    Args:
        x: rows ``[B, N, D]``, fp16, bf16, fp32 or fp64.
        bias: ``[D]``, of any of these dtypes.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    Returns:
        ``[B, N, D]`` of ``x``'s dtype. Both tensors get gradients of their dtypes.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :func:`modulated_norm`; rows may be of any width.
    """
    x = check_tensor("x", x, ("B", "N", "D"))
    check_tensor("bias", bias, x.shape[2:], like=("x", x), same_dtype=False)
    chosen = _resolve(backend, "bias_gelu", x, bias)
    if chosen == "reference":
        with autocast_off(x):
            return reference.bias_gelu(x, bias)
    return bias_gelu_fwd(x.flatten(0, 1), bias, chosen).view(x.shape)


def _resolve(backend: str, op: str, x: Tensor, *others: Tensor | None) -> str:
    """The backend for rows ``x``: instead of ``"torch"``, PyTorch's own layers for few rows on the CPU."""
    chosen = resolve(backend, op, x)
    _transforms.refuse(op, chosen, (x, *others))
    return "reference" if chosen == "torch" and values_are_readable(x) and x.numel() < LEAST else chosen
