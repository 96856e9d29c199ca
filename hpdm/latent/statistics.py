"""Mean and standard deviation of the latents, by which they are normalized per channel.

Without a KL divergence nothing keeps the latents near mean 0 and variance 1, and channels differ. The released code has
one scale and one shift per data set, without saying how they were found; here they are measured, for every channel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hpdm import distributed
from hpdm.latent.autoencoder import VideoAutoencoder


@torch.no_grad()
def measure_latents(model: VideoAutoencoder, clips: Iterable[Tensor]) -> None:
    """Sets ``latent_mean`` and ``latent_std`` of a model from clips, in one pass and in fp64. A collective.

    A channel that never changes gets the standard deviation 1.

    Args:
        model: in eval mode.
        clips: this rank's: uint8 ``[B, C, F, H, W]`` each, on the model's device.

    Raises:
        ValueError: no rank has a clip.
    """
    z = model.config.latent_channels
    sums = torch.zeros(3, z, dtype=torch.float64)  # of ones, latents, squares
    for video in clips:
        mean, _ = model.moments(video.float() / 127.5 - 1)
        latents = mean.double().transpose(0, 1).flatten(1)  # [z, N]
        found = torch.stack((torch.ones_like(latents).sum(1), latents.sum(1), latents.square().sum(1)))
        sums += found.cpu()
    count, total, squares = torch.stack(distributed.gather({distributed.rank(): sums})).sum(0).unbind()
    if not count.all():
        raise ValueError("clips: got none, expected at least one to measure the latents of")
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    # Rounding leaves a constant channel with a variance of about 1e-16 of its square.
    std = torch.where(variance > 1e-12 * mean.square().clamp(min=1e-12), variance.sqrt(), 1.0)
    model.latent_mean.copy_(mean)
    model.latent_std.copy_(std)
