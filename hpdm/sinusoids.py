"""Sinusoidal embedding of the diffusion time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpdm_kernels.boxes import coordinate_dtype

NOISE_FREQUENCIES = 256


def noise_frequencies(t: Tensor) -> Tensor:
    """Sinusoids of the diffusion time, in fp32 or wider: ``[...] -> [..., 256]``."""
    t = t.to(coordinate_dtype(t.dtype))
    half = NOISE_FREQUENCIES // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(1e4) / half))  # [128]
    angles = 1000 * t[..., None] * frequencies  # [..., 128]
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
