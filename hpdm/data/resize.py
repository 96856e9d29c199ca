"""Decoded frames of any size, resized and cropped to the size that a model is trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def resize_and_crop(frames: Tensor, size: tuple[int, int], pixel_aspect: float = 1.0) -> Tensor:
    """Resizes frames as a player shows them until they just cover ``size``, antialiased bilinear; crops the center.

    Args:
        frames: uint8 ``[F, H, W, C]``.
        size: (height, width) of the result, in square pixels.
        pixel_aspect: width of a pixel of ``frames`` over its height, > 0.

    Returns:
        uint8 ``[F, height, width, C]``; ``frames`` itself where the size is right already.
    """
    stored = height, width = frames.shape[1:3]
    shown = width * pixel_aspect
    scale = max(size[0] / height, size[1] / shown)
    target = max(size[0], round(height * scale)), max(size[1], round(shown * scale))
    if target != stored:
        planes = frames.permute(0, 3, 1, 2)  # [F, C, H, W]
        planes = F.interpolate(planes, target, mode="bilinear", align_corners=False, antialias=True)
        frames = planes.permute(0, 2, 3, 1)  # [F, *target, C]
    top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
    return frames[:, top : top + size[0], left : left + size[1]]


def resizing(size: tuple[int, int], pixel_aspect: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """:func:`resize_and_crop` for the frames of a decoder one by one, uint8 ``[H, W, 3]`` -> ``[height, width, 3]``."""

    def resized(frame: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(resize_and_crop(torch.from_numpy(frame)[None], size, pixel_aspect)[0])

    return resized
