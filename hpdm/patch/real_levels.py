"""Whole real videos at the resolution of a level, as the patches of training show them."""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm.patch.config import HPDMConfig
from hpdm_kernels import sample_patches


def level_of_video(config: HPDMConfig, video: Tensor, level: int) -> Tensor:
    """A whole video at a level's resolution: eq. 6 with the box of the whole video and the size of the level.

    A pixel of a level is the mean of the pixels of the target resolution that it covers, so the patch of a box on whole
    pixels of the level is a crop of this video.

    Args:
        config: gives the pyramid.
        video: uint8 ``[B, C, F, H, W]`` with height and width of ``config.resolution``, and a number of frames that is
            a multiple of the frames in one frame of the level.
        level: pyramid level.

    Returns:
        ``[B, C, f, h, w]`` float32 in [-1, 1].

    Raises:
        TypeError: the video is not uint8.
        ValueError: an unknown level, or another size.
    """
    if video.dtype is not torch.uint8:
        raise TypeError(f"video: got dtype {video.dtype}, expected torch.uint8")
    if not 0 <= level < config.levels:
        raise ValueError(f"level: got {level}, expected 0 to {config.levels - 1}")
    frames, (height, width) = video.shape[2], config.resolution[1:]
    growth = config.resolution[0] // config.level_resolution(level)[0]
    if tuple(video.shape[3:]) != (height, width) or frames % growth:
        raise ValueError(
            f"video: got size {tuple(video.shape[2:])}, expected a multiple of {growth} frames of {height}x{width}"
        )
    whole = torch.zeros(len(video), 6, device=video.device)  # filled on the device, where it does not wait
    whole[:, 3:] = 1.0
    size = (frames // growth, *config.level_resolution(level)[1:])
    return sample_patches(video, whole, size).div(127.5).sub(1.0)
