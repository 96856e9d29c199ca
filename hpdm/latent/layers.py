"""Layers of the video autoencoder: convolutions that repeat the edge, group normalization, residual blocks.

All tensors are ``[B, C, F, H, W]``. They are kept channels-last (in memory ``[B, F, H, W, C]``): the CPU's convolutions
are faster so, and the frames of a clip are a view as images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hpdm.checks import Triple
from hpdm.recompute import recomputed
from hpdm_kernels import group_norm_act

GROUPS = 32
EPS = 1e-6


def repeats(kernel: int, stride: int) -> tuple[int, int]:
    """How often a convolution repeats the first and the last position of an axis: ``kernel - stride`` in all.

    Where this is odd, the front gets one more (TATS' ``SamePadConv3d``, on which LVDM's autoencoder is built). The
    output then has ``ceil(n / stride)`` positions, for a stride that divides ``n`` exactly ``n / stride``.
    """
    total = max(kernel - stride, 0)
    return total - total // 2, total // 2


def repeat_edges(x: Tensor, kernel: int, stride: Triple) -> Tensor:
    """``x`` with its edges repeated as :func:`repeats` says, on each axis."""
    (f0, f1), (h0, h1), (w0, w1) = (repeats(kernel, s) for s in stride)
    if not any((f0, f1, h0, h1, w0, w1)):
        return x
    return F.pad(x, (w0, w1, h0, h1, f0, f1), mode="replicate")


class RepeatConv(nn.Conv3d):
    """A convolution with the same kernel on each axis, whose input's edges are repeated; the output is ``n / stride``.

    Args:
        inputs, outputs: channels.
        kernel: on every axis.
        stride: per axis.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: Triple = (1, 1, 1)) -> None:
        super().__init__(inputs, outputs, kernel, stride)
        self.kernel, self.strides = kernel, stride
        self.pad = [repeats(kernel, s) for s in stride]
        """How often the edges of each axis are repeated."""

    def prepared(self, x: Tensor) -> Tensor:
        """``x`` with repeated edges, which :meth:`convolved` takes."""
        return repeat_edges(x, self.kernel, self.strides)

    def convolved(self, padded: Tensor) -> Tensor:
        """The convolution alone."""
        return super().forward(padded)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(self.prepared(x))


class RepeatTransposedConv(nn.ConvTranspose3d):
    """A transposed convolution whose input's edges are repeated; the output is ``n * stride``.

    The input is padded as that of a convolution with the same kernel and stride, and ``kernel - 1`` positions are cut
    off at both ends of the result (TATS' ``SamePadConvTranspose3d``). This gives ``n * stride`` for any kernel with
    stride 1, and for kernel 4 with stride 2.

    Args:
        inputs, outputs: channels.
        kernel: on every axis.
        stride: per axis.

    Raises:
        ValueError: a stride for which the output has another size.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: Triple) -> None:
        if any(s * (kernel - s - 1) != kernel - 2 for s in stride):
            raise ValueError(f"stride: got {stride} with kernel {kernel}, expected 1, or 2 with kernel 4")
        super().__init__(inputs, outputs, kernel, stride, padding=kernel - 1)
        self.kernel, self.strides = kernel, stride

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            raise ValueError(f"output_size: got {output_size}, expected none: it is the input's times the stride")
        return super().forward(repeat_edges(x, self.kernel, self.strides))


class VideoNorm(nn.GroupNorm):
    """Group normalization with statistics over a group of channels and the positions of a frame, or of all frames.

    There are 32 groups (fewer where a group would have less than two channels), and eps is 1e-6.

    Args:
        channels: number of channels.
        per_frame: whether statistics are those of a frame; else those of the clip.
        kernels: backend, see :func:`hpdm_kernels.group_norm_act`.
    """

    def __init__(self, channels: int, per_frame: bool, kernels: str = "auto") -> None:
        super().__init__(math.gcd(GROUPS, max(1, channels // 2)), channels, eps=EPS)
        self.per_frame, self.kernels = per_frame, kernels

    def forward(self, x: Tensor, act: str = "none", pad: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """``x`` normalized, with SiLU behind it (``act="silu"``), and with repeated edges as of a convolution."""
        out = group_norm_act(
            x.movedim(1, -1), self.weight, self.bias, self.num_groups, over="frame" if self.per_frame else "clip",
            act=act, pad=pad, eps=self.eps, backend=self.kernels,
        )  # fmt: skip
        return out.movedim(-1, 1)


class ResidualBlock(nn.Module):
    """Twice normalization, SiLU and a 3x3x3 convolution, added to the input.

    The backward pass computes again normalization, activation and padding (``recompute="selective"``), or all that is
    inside of the block (``"block"``).
    """

    def __init__(self, channels: int, per_frame: bool, recompute: str = "none", kernels: str = "auto") -> None:
        super().__init__()
        self.norm1, self.conv1 = VideoNorm(channels, per_frame, kernels), RepeatConv(channels, channels, 3)
        self.norm2, self.conv2 = VideoNorm(channels, per_frame, kernels), RepeatConv(channels, channels, 3)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        return x + (recomputed(self._branch, x) if self.recompute == "block" else self._branch(x))

    def _branch(self, x: Tensor) -> Tensor:
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            x = normalized_conv(norm, conv, x, self.recompute)
        return x


class Stage(nn.Sequential):
    """A convolution that changes the resolution, and residual blocks."""

    def __init__(
        self, conv: nn.Module, channels: int, blocks: int, per_frame: bool, recompute: str, kernels: str
    ) -> None:
        super().__init__(conv, *(ResidualBlock(channels, per_frame, recompute, kernels) for _ in range(blocks)))


def normalized_conv(norm: VideoNorm, conv: RepeatConv, x: Tensor, recompute: str) -> Tensor:
    """``conv(silu(norm(x)))``; what comes before the convolution is computed again under ``"selective"``.

    Normalization, activation and repeated edges are one op, which writes what the convolution reads.
    """

    def prepared(x: Tensor) -> Tensor:
        return norm(x, "silu", conv.pad)

    return conv.convolved(recomputed(prepared, x) if recompute == "selective" else prepared(x))


def to_channels(x: Tensor, block: Sequence[int]) -> Tensor:
    """Blocks (f, h, w) of positions as channels: ``[B, C, F f, H h, W w]`` to ``[B, C f h w, F, H, W]``."""
    f, h, w = block
    b, c, frames, height, width = x.shape
    split = x.reshape(b, c, frames // f, f, height // h, h, width // w, w)
    return split.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * f * h * w, frames // f, height // h, width // w)


def to_positions(x: Tensor, block: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_channels`."""
    f, h, w = block
    b, c, frames, height, width = x.shape
    split = x.reshape(b, c // (f * h * w), f, h, w, frames, height, width)
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // (f * h * w), frames * f, height * h, width * w)
