"""Blocks of the U-Net that work on each frame: convolutions, normalization, residual blocks, spatial attention.

Tensors are ``[B, T, H, W, C]`` and contiguous. To a convolution the frames are a batch of images, channels-last: a
kernel of (1, 3, 3) is a 3x3 convolution, which is several times faster in two dimensions. Attention takes the same
memory as rows of tokens.
"""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from hpdm_kernels import group_norm_act

EPS = 1e-5
"""Of group normalization."""

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def zero_started(module: AnyModule) -> AnyModule:
    """Sets a module's parameters to zero, so that what it computes is 0 until it is trained; returns the module."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class FrameConv(nn.Conv2d):
    """A 3x3 convolution of every frame with zeros around it; with a stride of 2 it halves height and width.

    Args:
        inputs, outputs: channels.
        stride: of height and width.
        bias: whether there is a bias.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H, W, C] -> [B, T, H / stride, W / stride, C']``."""
        images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [B T, C, H, W], channels-last
        out = super().forward(images).permute(0, 2, 3, 1)  # [B T, H, W, C']
        return out.contiguous().unflatten(0, x.shape[:2])


def doubled(x: Tensor) -> Tensor:
    """Each position four times: ``[B, T, H, W, C] -> [B, T, 2 H, 2 W, C]``."""
    images = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    return images.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


class VideoNorm(nn.GroupNorm):
    """Group normalization with statistics of the whole clip, or of each frame.

    Args:
        groups: number of groups.
        width: channels C.
        over: ``"clip"`` or ``"frame"``.
        kernels: backend, see :func:`hpdm_kernels.group_norm_act`.
    """

    def __init__(self, groups: int, width: int, over: str, kernels: str = "auto") -> None:
        super().__init__(groups, width, EPS)
        self.over, self.kernels = over, kernels

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, act: str = "none") -> Tensor:
        """``[B, T, H, W, C] -> [B, T, H, W, C]``, of ``x``'s dtype under automatic mixed precision, too.

        Args:
            x: what is normalized.
            scale, shift: ``[B, 1 or T, C]``, modulate the result: times ``1 + scale`` plus ``shift``.
            act: ``"silu"`` if SiLU follows, or ``"none"``.
        """
        return group_norm_act(
            x, self.weight, self.bias, self.num_groups, scale, shift, over=self.over, act=act, eps=self.eps,
            backend=self.kernels,
        )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two convolutions, the second one after adaptive group normalization (Dhariwal and Nichol 2021).

    It is the identity, or the map between the two widths, until it is trained.

    Args:
        inputs, outputs: channels.
        vector_width: width of the conditioning vector.
        groups, norm, kernels: as of :class:`VideoNorm`.
    """

    def __init__(
        self, inputs: int, outputs: int, vector_width: int, groups: int, norm: str, kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.in_norm = VideoNorm(groups, inputs, norm, kernels)
        self.in_conv = FrameConv(inputs, outputs)
        self.modulation = nn.Linear(vector_width, 2 * outputs)
        self.out_norm = VideoNorm(groups, outputs, norm, kernels)
        self.out_conv = zero_started(FrameConv(outputs, outputs))
        self.skip = nn.Linear(inputs, outputs) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """``x [B, T, H, W, C]``, ``vector [B, 1 or T, c]``, activated -> ``[B, T, H, W, C']``."""
        scale, shift = self.modulation(vector).chunk(2, dim=-1)  # [B, 1 or T, C'] each
        h = self.in_conv(self.in_norm(x, act="silu"))
        return self.skip(x) + self.out_conv(self.out_norm(h, scale, shift, act="silu"))


class SpatialAttention(nn.Module):
    """Self-attention of the positions of each frame, added to the input; the identity until it is trained.

    Args:
        width: channels C.
        heads: number of heads.
        groups: groups of the normalization, whose statistics are those of a frame.
        kernels: as of :class:`VideoNorm`.
    """

    def __init__(self, width: int, heads: int, groups: int, kernels: str = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.norm = VideoNorm(groups, width, "frame", kernels)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = zero_started(nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H, W, C] -> [B, T, H, W, C]``."""
        qkv = self.qkv(self.norm(x)).flatten(0, 1).flatten(1, 2)  # [B T, N, 3 C]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )  # [B T, heads, N, d] each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return x + self.out(attended.reshape(x.shape))


class TextAttention(nn.Module):
    """Attention of the positions of each frame to a text, added to the input; the identity until it is trained.

    Args:
        width: channels C.
        text_width: width of the text embeddings.
        heads: number of heads.
        groups: groups of the normalization, whose statistics are those of a frame.
        kernels: as of :class:`VideoNorm`.
    """

    def __init__(self, width: int, text_width: int, heads: int, groups: int, kernels: str = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.norm = VideoNorm(groups, width, "frame", kernels)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(text_width, 2 * width)
        self.out = zero_started(nn.Linear(width, width))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Reads the text.

        Args:
            x: ``[B, T, H, W, C]``.
            text: ``[B, S, text_width]``.
            mask: ``[B, S]`` bool, the tokens that may be read, at least one per text; ``None`` for all.

        Returns:
            ``[B, T, H, W, C]``.
        """
        q = self.q(self.norm(x)).flatten(1, 3).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, T N, d]
        k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.kv(text).chunk(2, dim=-1)
        )  # [B, heads, S, d] each
        attended = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))
