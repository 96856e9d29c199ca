"""Positions of tokens inside a patch: what their tables hold at initialization."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def axis_sinusoids(n: int, width: int, axis: int) -> Tensor:
    """Initial position table of one axis, ``[n, width]``: sinusoids on that axis' own third of the channels.

    They are as large as the normalized tokens that they are added to, so that the latents can tell positions apart from
    the first step on.
    """
    table = torch.zeros(n, width)
    channels = torch.arange(axis, width, 3)  # [width / 3]
    wave = torch.arange(len(channels)) // 2
    frequency = (0.5 * math.pi) * torch.exp(-math.log(4.0 * n) * wave / max(1, len(channels) // 2))
    angle = torch.arange(n)[:, None] * frequency  # [n, width / 3]
    table[:, channels] = torch.where(torch.arange(len(channels)) % 2 == 0, angle.sin(), angle.cos())
    return table
