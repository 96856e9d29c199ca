"""The adversarial part of the autoencoder's objective, as in the released code of LVDM (and of VQGAN before it)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.discriminator import FrameDiscriminator
from hpdm.latent.losses import AutoencoderDraws, reconstruction_losses, shown_clips
from hpdm.opponent import Game, Opponent

BETAS = (0.5, 0.9)
"""Of the discriminator's Adam, as released."""
MOST_WEIGHT = 1e4
LEAST_NORM = 1e-4
"""Added to the norm by which the adaptive weight divides."""


class Discriminating(Opponent):
    """A discriminator of the frames of reconstructions, against which an autoencoder trains."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config.gan_start, BETAS)
        self.config = config

    def build(self) -> FrameDiscriminator:
        return FrameDiscriminator(self.config.channels)

    def play(
        self,
        opponent: nn.Module,
        model: VideoAutoencoder,
        batch: Mapping[str, Tensor],
        draws: AutoencoderDraws,
        network: Callable[..., Any] | None = None,
    ) -> Game:
        """The reconstruction losses, and hinge losses of all frames as single images.

        Columns of the log: ``loss_generator`` without its weight, ``loss_discriminator`` and ``adaptive_weight``.
        """
        x = shown_clips(self.config, batch["video"], draws)
        out = (network or model)(x=x)
        losses = reconstruction_losses(self.config, out, x)
        real, fake = (video.transpose(1, 2).flatten(0, 1) for video in (x, out))  # [B F, C, H, W]
        fixed = {name: p.detach() for name, p in opponent.named_parameters()}
        generator = -torch.func.functional_call(opponent, fixed, (fake,)).mean()
        weight = adaptive_weight(torch.stack(list(losses.values())).mean(), generator, model.decoder.last.weight)
        own = hinge_loss(opponent(real), opponent(fake.detach()))
        reported = {"loss_generator": generator, "loss_discriminator": own, "adaptive_weight": weight}
        return Game(
            losses, self.config.gan_weight * weight * generator, own, {name: t.detach() for name, t in reported.items()}
        )


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss, one number: half the sum of the means of ``max(0, 1 - real)`` and ``max(0, 1 + fake)``.

    Args:
        real, fake: its scores of real and of reconstructed frames, of any shape.
    """
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, generator: Tensor, weight: Tensor) -> Tensor:
    """How much larger one loss's gradient is than the other's at ``weight``, in [0, 1e4] and without gradient.

    It is ``|d reconstruction / d weight| / (|d generator / d weight| + 1e-4)``. So the second loss times this number
    pulls at ``weight`` as strongly as the first, and a gradient of zero gives a finite number.

    Args:
        reconstruction, generator: losses, scalars whose graphs stay.
        weight: of the last layer of the network that they train.
    """
    of_reconstruction, of_generator = (
        torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm() for loss in (reconstruction, generator)
    )
    return (of_reconstruction / (of_generator + LEAST_NORM)).clamp(0.0, MOST_WEIGHT)
