"""Joint training on images and videos: a share of the clips of a step becomes still videos.

The paper's text-to-video models are trained on 4096 + 4096 (1K: 1024 + 1024) videos and images per step (Table 8), an
image being repeated along time (section 5.2). **Reading:** images are frames of the clips themselves, so that no second
set is needed; text and labels stay those of the clip. Nothing tells the network which samples are stills: at every
level they are videos like the others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def still_images(video: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Repeats one random frame of some random clips along time.

    Args:
        video: ``[B, C, F, H, W]``, any dtype and device.
        share: share of the clips that become images, 0 to 1. Where ``share * B`` is no whole number it is rounded
            up or down at random, so that the share is right on average even for one clip per device.
        generator: CPU generator, from which nothing is drawn for a share of 0.

    Returns:
        The same shape; ``video`` itself for a share of 0.

    Raises:
        ValueError: a share outside of 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"images: got {share}, expected a share from 0 to 1")
    if share == 0:
        return video
    batch, _, frames = video.shape[:3]
    # The sum is below `batch` + 1, but not always after rounding.
    count = min(batch, int(share * batch + float(torch.rand((), generator=generator))))
    rows = torch.randperm(batch, generator=generator)[:count].to(video.device)
    chosen = torch.randint(frames, (count,), generator=generator).to(video.device)
    stills = video.clone()
    stills[rows] = video[rows, :, chosen].unsqueeze(2).expand_as(stills[rows])
    return stills
