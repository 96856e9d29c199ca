"""The whole model of latent video diffusion: the U-Net that is trained, and the autoencoder that is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpdm.integrity import hash_of_json, hash_of_tensor
from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.frozen import frozen
from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.unet import FactorizedUNet


class LVDM(nn.Module):
    """A U-Net together with the autoencoder of its latents, so that a run or a file of it is all that sampling needs.

    The autoencoder's weights are buffers: they are stored and not trained.

    Args:
        config: of both.
        kernels, recompute: as of :class:`~hpdm.latent.unet.FactorizedUNet`.

    Raises:
        ValueError: unknown backend or recompute setting.
    """

    def __init__(self, config: LatentConfig, kernels: str = "auto", recompute: str = "none") -> None:
        super().__init__()
        self.config = config
        self.unet = FactorizedUNet(config.unet, kernels, recompute)
        self.autoencoder = frozen(VideoAutoencoder(config.autoencoder, kernels))

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, text: Tensor | None = None,
        text_mask: Tensor | None = None, *, frame_t: Tensor | None = None, sparse: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What the U-Net predicts of noised latents; see :meth:`hpdm.latent.unet.FactorizedUNet.forward`."""
        predicted: Tensor = self.unet(x, t, labels, text, text_mask, frame_t=frame_t, sparse=sparse)
        return predicted

    @torch.no_grad()
    def set_autoencoder(self, autoencoder: nn.Module) -> None:
        """Takes over the weights of a trained autoencoder with the config's sizes.

        Raises:
            ValueError: they are not those that the config names.
        """
        found = hash_of_autoencoder(autoencoder)
        if found != self.config.autoencoder_hash:
            raise ValueError(
                f"autoencoder: got weights with the hash {found[:16]}, expected {self.config.autoencoder_hash[:16]}"
            )
        self.autoencoder.load_state_dict(autoencoder.state_dict())


def hash_of_autoencoder(autoencoder: nn.Module) -> str:
    """A hash of an autoencoder's weights and of what was measured of it: latents of another hash mean other videos."""
    state: dict[str, Any] = autoencoder.state_dict()
    return hash_of_json({name: hash_of_tensor(t.cpu()) for name, t in state.items()})
