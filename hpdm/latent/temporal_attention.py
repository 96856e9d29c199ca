"""Attention along time with relative positions, at each position of a frame on its own (LVDM section 3.2).

A frame's query meets the keys of all frames, to which the embedding of their distance is added; so it is with the
values (Shaw et al. 2018, eq. 3 and 4). Distances beyond the farthest of a training clip count as that one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpdm.latent.unet_blocks import EPS, zero_started
from hpdm_kernels.boxes import coordinate_dtype


def relative_positions(table: Tensor, frames: int) -> Tensor:
    """The embedding of the distance from each frame to each other one.

    Args:
        table: ``[2 D + 1, d]``, embeddings of the distances -D .. D.
        frames: number of frames T.

    Returns:
        ``[T, T, d]``: at ``[t, s]`` the embedding of ``s - t``, of -D or D where that is farther.
    """
    farthest = len(table) // 2
    frame = torch.arange(frames, device=table.device)
    distance = (frame - frame[:, None]).clamp(-farthest, farthest)  # [T, T]
    return table[distance + farthest]


def relative_attention(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention with relative positions: ``softmax_s(q_t . (k_s + keys[s - t]) / sqrt(d))`` of ``v_s + values[s - t]``.

    Both terms of the products are scaled by ``d^-1/2``.

    Args:
        q, k, v: ``[R, T, d]``, R sequences of T frames, floating point.
        keys, values: embeddings of the distances -D .. D, ``[2 D + 1, d]``, of the same dtype.

    Returns:
        ``[R, T, d]``.
    """
    frames, width = q.shape[1:]
    scale = width**-0.5
    # A frame has the same embeddings in all sequences, so they are multiplied as T matrices, those of a frame at once.
    of_keys = torch.bmm(q.transpose(0, 1), relative_positions(keys, frames).transpose(1, 2)).transpose(0, 1)
    scores = torch.baddbmm(of_keys, q, k.transpose(1, 2), beta=scale, alpha=scale)  # [R, T, T]
    weights = scores.softmax(dim=-1)
    of_values = torch.bmm(weights.transpose(0, 1), relative_positions(values, frames)).transpose(0, 1)
    return torch.baddbmm(of_values, weights, v)


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
        farthest: largest distance D with an embedding of its own.
    """

    def __init__(self, width: int, heads: int, groups: int, farthest: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = PositionNorm(groups, width, EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.keys = nn.Parameter(torch.empty(2 * farthest + 1, width // heads))
        self.values = nn.Parameter(torch.empty(2 * farthest + 1, width // heads))
        self.out = zero_started(nn.Linear(width, width))
        nn.init.xavier_uniform_(self.keys)
        nn.init.xavier_uniform_(self.values)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H, W, C] -> [B, T, H, W, C]``."""
        batch, frames, height, width, channels = x.shape
        qkv = self.qkv(self.norm(x.flatten(2, 3)))  # [B, T, N, 3 C]
        # One copy of each, which puts the frames of a position next to each other, and none between the products.
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1, 4).reshape(-1, frames, channels // self.heads)
            for part in qkv.chunk(3, dim=-1)
        )  # [R, T, d] each, R = B * N * heads
        tables = self.keys.to(q.dtype), self.values.to(q.dtype)
        attended = relative_attention(q, k, v, *tables).reshape(batch, height * width, self.heads, frames, -1)
        out: Tensor = self.out(attended.permute(0, 3, 1, 2, 4).reshape(x.shape))
        return x + out
