"""Joint training on images and videos: some of the clips of a step are replaced by still videos.

The paper trains its text-to-video models on 4096 videos and 4096 images per step (1024 and 1024 at 1K; Table 8), where
an image is repeated along time (section 5.2). **Reading:** the images are frames of the clips themselves, with the
clip's text or label, so that no set of images is needed. The network is not told which samples are stills.
"""

from __future__ import annotations

import torch
from torch import Tensor


def still_images(video: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Repeats one random frame of some random clips along time.

    Args:
        video: ``[B, C, F, H, W]``, any dtype and device.
        share: fraction of the clips that become stills, 0 to 1. Where ``share * B`` is no integer it is rounded up or
            down at random, so that the share is right on average even for one clip per device.
        generator: CPU generator; nothing is drawn from it for a share of 0.

    Returns:
        ``[B, C, F, H, W]``; ``video`` itself for a share of 0, else a new tensor.

    Raises:
        ValueError: a share outside of 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"images: got {share}, expected a share from 0 to 1")
    if share == 0:
        return video
    batch, _, frames = video.shape[:3]
    # The sum is below `batch` + 1 exactly, but rounding may make it equal: hence the `min`.
    count = min(batch, int(share * batch + float(torch.rand((), generator=generator))))
    rows = torch.randperm(batch, generator=generator)[:count].to(video.device)
    numbers = torch.randint(frames, (count,), generator=generator).to(video.device)
    stills = video.clone()
    stills[rows] = video[rows, :, numbers].unsqueeze(2).expand_as(stills[rows])  # [count, C, F, H, W]
    return stills
