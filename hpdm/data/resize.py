"""Decoded frames of any size, resized and cropped to the size that a model is trained on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_and_crop(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes frames until they just cover ``size`` (antialiased bilinear, aspect ratio kept), then crops the center.

    Args:
        frames: uint8 ``[F, H, W, C]``.
        size: (height, width) of the result.

    Returns:
        uint8 ``[F, height, width, C]``; ``frames`` itself where the size is right already.
    """
    height, width = frames.shape[1:3]
    scale = max(size[0] / height, size[1] / width)
    if scale != 1:
        target = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
        planes = frames.permute(0, 3, 1, 2)  # [F, C, H, W]
        planes = F.interpolate(planes, target, mode="bilinear", align_corners=False, antialias=True)
        frames = planes.permute(0, 2, 3, 1)  # [F, *target, C]
        height, width = target
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return frames[:, top : top + size[0], left : left + size[1]]
