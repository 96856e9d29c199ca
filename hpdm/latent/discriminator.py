"""The discriminator of the video autoencoder: a PatchGAN of single frames, as in the released code of LVDM."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTH = 64
"""Channels after the first convolution."""
LAYERS = 3
"""Convolutions that halve the resolution; each but the first doubles the channels."""
SMALLEST_SIDE = 24
"""Height and width of the smallest frames of which it sees at least one patch."""
DEVIATION = 0.02
"""Standard deviation of the first weights: of convolutions around 0, of the scales of normalization around 1."""


class FrameDiscriminator(nn.Module):
    """Tells frames of clips from reconstructed ones, patch by patch of 70x70 pixels (Isola et al. 2017; 2.77 M).

    Batch normalization always takes the statistics of the frames of one call, in training the frames of a micro-batch
    on one rank, and keeps none: there is nothing but parameters.

    Args:
        channels: of a pixel.
        width: channels after the first convolution.
    """

    def __init__(self, channels: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(LAYERS + 1)]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (before, after) in enumerate(pairwise(widths), start=1):
            stride = 2 if i < LAYERS else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(after, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        with torch.no_grad():
            for layer in layers:
                if isinstance(layer, nn.Conv2d):
                    layer.weight.normal_(0.0, DEVIATION)
                elif isinstance(layer, nn.BatchNorm2d):
                    layer.weight.normal_(1.0, DEVIATION)

    def forward(self, frames: Tensor) -> Tensor:
        """How real each patch of frames looks.

        Args:
            frames: ``[N, C, H, W]`` float, pixels in [-1, 1], height and width at least :data:`SMALLEST_SIDE`.

        Returns:
            float32 ``[N, 1, H // 8 - 2, W // 8 - 2]``, above 0 for real and below for reconstructed.
        """
        scores: Tensor = self.layers(frames)
        return scores.float()
