"""Group normalization (Wu and He 2018), with the modulation and the activation that follow it, in few passes.

    y   = (x - mean) / sqrt(var + eps) * weight + bias       mean and var of a group of channels, of a frame or a clip
    z   = y * (1 + scale) + shift                            adaptive normalization (Dhariwal and Nichol 2021), optional
    out = z * sigmoid(z)                                     SiLU, optional

``x`` is ``[B, T, H, W, C]`` in memory, channels last; the result may have its edges repeated, as a convolution without
padding reads it next. The least to do is to read ``x`` for the statistics, to read it again unless a cache has kept it,
and to write the result: 12 bytes per number in fp32; backward 20, for which gradient and ``x`` are read twice. Written
with PyTorch's operations, this is 20 bytes forward, 28 with a modulation, and 8 more for repeated edges.

Statistics are sums of squares around means, never differences of squares: with a mean of 1,000 deviations PyTorch's own
group normalization of channels-last tensors on a CPU is wrong in the first digit. All sums have a fixed order; there
are no atomics, so every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpdm_kernels import _transforms, reference
from hpdm_kernels._backend import autocast_off, resolve
from hpdm_kernels._checks import check_number, check_tensor, values_are_readable
from hpdm_kernels.groupnorm.checks import check_choice, check_groups, check_pad
from hpdm_kernels.groupnorm.ops import group_norm_act_fwd

LEAST = 1 << 19
"""Elements of ``x`` below which ``"torch"`` takes the formula in PyTorch's own operations on the CPU: the calls of a
registered op cost more than its fewer passes save."""


def group_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    over: str = "frame",
    act: str = "silu",
    pad: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Group normalization, ``* (1 + scale) + shift``, SiLU and repeated edges of ``x``, each but the first optional.

    Args:
        x: ``[B, T, H, W, C]``, fp16, bf16, fp32 or fp64; fastest where C has stride 1.
        weight, bias: ``[C]``.
        groups: number of groups G, a divisor of C. Statistics are those of ``C / G`` neighboring channels.
        scale, shift: ``[B, C]`` or ``[B, 1, C]``, or one for each frame, ``[B, T, C]``. Both or none.
        over: positions of the statistics: those of a ``"frame"`` (H, W), or of the whole ``"clip"`` (T, H, W).
        act: ``"silu"``, or ``"none"``.
        pad: how often the first and the last position of T, H and W are repeated, three pairs of ints; ``None`` for
            never.
        eps: added to the variance, greater than 0.
        backend: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``.

    All tensors but ``x`` may have any of the four dtypes, as under autocast. Every tensor gets a gradient of its dtype.

    Returns:
        Contiguous ``[B, T', H', W', C]`` of ``x``'s dtype, sizes with what is repeated. A NaN or infinity in ``x``
        makes its group of the frame or clip not finite, one in a vector its channel.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, groups that do not divide the channels, a scale without a shift, an ``eps``
            that is not positive, a negative number of repetitions, an unknown backend or choice.
        RuntimeError: ``backend="triton"`` cannot run here.
        NotImplementedError: ``torch.func`` or forward mode differentiates the op on another backend than ``reference``.
    """
    x = check_tensor("x", x, ("B", "T", "H", "W", "C"))
    batch, frames, _, _, channels = x.shape
    check_tensor("weight", weight, (channels,), like=("x", x), same_dtype=False)
    check_tensor("bias", bias, (channels,), like=("x", x), same_dtype=False)
    groups = check_groups(groups, channels)
    if (scale is None) != (shift is None):
        name = "scale" if scale is None else "shift"
        raise ValueError(f"{name}: got None, expected scale and shift, or neither")
    if scale is not None and shift is not None:
        check_tensor("scale", scale, like=("x", x), same_dtype=False)
        size: tuple[int, ...] = (batch, channels)
        if scale.ndim == 3:
            size = (batch, 1 if scale.shape[1] == 1 else frames, channels)
        check_tensor("scale", scale, size)
        check_tensor("shift", shift, size, like=("x", x), same_dtype=False)
        if scale.ndim == 2:
            scale, shift = scale[:, None], shift[:, None]
    check_choice("over", over, ("frame", "clip"))
    check_choice("act", act, ("silu", "none"))
    sides = check_pad(pad)
    eps = check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps: got {eps}, expected a number > 0")
    chosen = resolve(backend, "group_norm_act", x)
    _transforms.refuse("group_norm_act", chosen, (x, weight, bias, scale, shift))
    if chosen == "torch" and values_are_readable(x) and x.numel() < LEAST:
        chosen = "reference"
    options = (groups, over == "clip", act == "silu", sides, eps)
    if chosen == "reference":
        with autocast_off(x):
            return reference.group_norm_act(x, weight, bias, scale, shift, *options)
    return group_norm_act_fwd(x, weight, bias, scale, shift, *options, chosen)[0]
