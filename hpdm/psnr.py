"""Peak signal-to-noise ratio of pixels in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_ERROR = 1e-12


def psnr(error: Tensor) -> Tensor:
    """``10 log10(2^2 / error)`` in dB of mean squared errors of any shape; 2 is the range of the pixels."""
    return 10 * torch.log10(4 / error.clamp(min=_SMALLEST_ERROR))
