"""Attention along time with relative positions, at each position of a frame on its own (LVDM section 3.2).

A frame's query meets the keys of all frames, to which the embedding of their distance is added; so it is with the
values (Shaw et al. 2018, eq. 3 and 4): :func:`hpdm_kernels.temporal_attention`. Distances beyond the farthest of a
training clip count as that one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpdm.latent.unet_blocks import EPS, zero_started
from hpdm_kernels import temporal_attention
from hpdm_kernels.boxes import coordinate_dtype


class PositionNorm(nn.GroupNorm):
    """Group normalization of each position's frames: statistics over time and the channels of a group."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, N, C] -> [B, T, N, C]``, fp32 or wider."""
        # As group normalization does under automatic mixed precision.
        groups = x.to(coordinate_dtype(x.dtype)).unflatten(-1, (self.num_groups, -1))  # [B, T, N, G, c]
        variance, mean = torch.var_mean(groups, dim=(1, 4), correction=0, keepdim=True)  # [B, 1, N, G, 1]
        scale = (variance + self.eps).rsqrt() * self.weight.unflatten(0, (self.num_groups, -1))  # [B, 1, N, G, c]
        shift = self.bias.unflatten(0, (self.num_groups, -1)) - mean * scale
        return torch.addcmul(shift, groups, scale).flatten(-2)


class TemporalAttention(nn.Module):
    """Self-attention of the frames at each position, added to the input; the identity until it is trained.

    Args:
        width: channels C.
        heads: heads, which share the embeddings of distances.
        groups: groups of the normalization.
        farthest: largest distance with an embedding of its own.
        kernels: backend of the attention, ``"auto" | "reference" | "torch" | "triton"``.
    """

    def __init__(self, width: int, heads: int, groups: int, farthest: int, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels
        self.norm = PositionNorm(groups, width, EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.keys = nn.Parameter(torch.empty(2 * farthest + 1, width // heads))
        self.values = nn.Parameter(torch.empty(2 * farthest + 1, width // heads))
        self.out = zero_started(nn.Linear(width, width))
        nn.init.xavier_uniform_(self.keys)
        nn.init.xavier_uniform_(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H, W, C] -> [B, T, H, W, C]``."""
        qkv = self.qkv(self.norm(x.flatten(2, 3)))  # [B, T, N, 3 C]
        attended = temporal_attention(qkv, self.keys, self.values, backend=self.kernels)  # [B, T, N, C]
        out: Tensor = self.out(attended.view(x.shape))
        return x + out
