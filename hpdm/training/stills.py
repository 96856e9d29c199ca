"""Joint training on images and videos: some of the clips of a step are replaced by still videos.

The paper trains its text-to-video models on 4096 videos and 4096 images per step (1024 and 1024 at 1K; Table 8), where
an image is repeated along time (section 5.2). **Reading:** the images are frames of the clips themselves, with the
clip's text or label, so that no set of images is needed. The network is not told which samples are stills.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_stills(batch: int, frames: int, share: float, generator: torch.Generator) -> Tensor | None:
    """Draws which clips become stills, and of which frame.

    Args:
        batch: number of clips B.
        frames: frames F of a clip.
        share: fraction of the clips that become stills, 0 to 1. Where ``share * B`` is no integer it is rounded up or
            down at random, so that the share is right on average even for one clip per device.
        generator: CPU generator; nothing is drawn from it for a share of 0.

    Returns:
        For each frame the number of the frame that it shows, int64 ``[B, F]``; ``None`` for a share of 0.

    Raises:
        ValueError: a share outside of 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"images: got {share}, expected a share from 0 to 1")
    if share == 0:
        return None
    # The sum is below `batch` + 1 exactly, but rounding may make it equal: hence the `min`.
    count = min(batch, int(share * batch + float(torch.rand((), generator=generator))))
    rows = torch.randperm(batch, generator=generator)[:count]
    shown = torch.arange(frames).repeat(batch, 1)
    shown[rows] = torch.randint(frames, (count,), generator=generator)[:, None]
    return shown


def show_frames(video: Tensor, shown: Tensor) -> Tensor:
    """Clips that show frame ``shown[b, f]`` of clip b as their frame ``f``, ``[B, C, n, H, W]``.

    Args:
        video: ``[B, C, F, H, W]``, any dtype.
        shown: int64 ``[B, n]``, on the same device.
    """
    _, channels, _, height, width = video.shape
    return video.gather(2, shown[:, None, :, None, None].expand(-1, channels, -1, height, width))
