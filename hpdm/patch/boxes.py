"""The patch hierarchy (paper section 4.1): random nested boxes, and the patches of a video inside them.

A box is a float32 row ``(offset_f, offset_h, offset_w, scale_f, scale_h, scale_w)`` in fractions of the whole video.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm.patch.config import HPDMConfig
from hpdm_kernels import sample_patches


def sample_boxes(config: HPDMConfig, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """Random nested boxes, one per level: ``[B, L, 6]`` float32 on the CPU.

    Level 0 is the whole video, level ``l`` lies inside level ``l-1`` at a uniform offset, and the last level falls on
    whole pixels of the target resolution (section 4.5, "Integer patch coordinates").

    Args:
        config: gives the pyramid.
        batch: number of rows, B.
        generator: CPU generator; ``None`` for PyTorch's global one.
    """
    boxes = torch.zeros(batch, config.levels, 6)
    boxes[:, 0, 3:] = 1.0
    for level in range(1, config.levels):
        parent = boxes[:, level - 1].double()
        scale = torch.tensor(config.level_scale(level), dtype=torch.float64)
        u = torch.rand(batch, 3, generator=generator, dtype=torch.float64)
        low, room = parent[:, :3], parent[:, 3:] - scale  # [B, 3]: the lowest offset, and how far it may move
        if level == config.levels - 1:
            pixels = torch.tensor(config.resolution, dtype=torch.float64)
            first, last = torch.ceil(low * pixels - 1e-6), torch.floor((low + room) * pixels + 1e-6)
            offset = torch.minimum(first + torch.floor(u * (last - first + 1)), last) / pixels
        else:
            offset = low + u * room
        boxes[:, level, :3] = offset.float()
        boxes[:, level, 3:] = scale.float()
    return boxes


def extract_patches(video: Tensor, boxes: Tensor, config: HPDMConfig, backend: str = "auto") -> Tensor:
    """The patches of every level (paper eq. 6) in [-1, 1]: ``[B, C, F, H, W] -> [B, L, C, f, h, w]`` float32.

    Args:
        video: uint8 in [0, 255], at ``config.resolution``.
        boxes: ``[B, L, 6]`` from :func:`sample_boxes`, on the same device.
        config: gives the patch size.
        backend: see :func:`hpdm_kernels.sample_patches`.

    Raises:
        TypeError: the video is not uint8.
        ValueError: the video is not at the target resolution of the pyramid.
    """
    if video.dtype is not torch.uint8:
        raise TypeError(f"video: got dtype {video.dtype}, expected torch.uint8")
    if tuple(video.shape[2:]) != config.resolution:
        raise ValueError(f"video: got size {tuple(video.shape[2:])}, expected config.resolution = {config.resolution}")
    levels = [
        sample_patches(video, boxes[:, level].contiguous(), config.patch, backend=backend)
        for level in range(config.levels)
    ]
    return torch.stack(levels, dim=1).div_(127.5).sub_(1.0)
