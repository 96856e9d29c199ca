"""The video autoencoder of LVDM (section 3.1): TATS' VQGAN without its codebook.

It is made of 3-D convolutions and residual blocks, and has no attention. The encoder also returns a log variance, as
published, but the weight of the KL divergence is published as 0, so the mean alone is trained and used here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpdm.checks import check_choice
from hpdm.latent.config import DECODER_BLOCKS, ENCODER_BLOCKS, KERNEL, AutoencoderConfig
from hpdm.latent.layers import (
    RepeatConv,
    RepeatTransposedConv,
    Stage,
    VideoNorm,
    normalized_conv,
    to_channels,
    to_positions,
)
from hpdm.recompute import Recompute
from hpdm_kernels.modules import check_backend

LOGVAR_RANGE = (-30.0, 20.0)
"""The log variance is clamped to this, as in the released code."""


class Encoder(nn.Module):
    """Pixels ``[B, C, F, H, W]`` to moments ``[B, 2 z, f, h, w]``."""

    def __init__(self, config: AutoencoderConfig, recompute: str, kernels: str) -> None:
        super().__init__()
        per_frame, f, h, w = config.norm == "frame", *config.stem
        self.stem, self.recompute = config.stem, recompute
        self.first = RepeatConv(config.channels * f * h * w, config.width, 3)
        widths = [config.width * 2**i for i in range(len(config.strides) + 1)]
        self.stages = nn.ModuleList(
            Stage(RepeatConv(before, after, KERNEL, stride), after, ENCODER_BLOCKS, per_frame, recompute, kernels)
            for before, after, stride in zip(widths, widths[1:], config.strides)
        )
        self.norm = VideoNorm(widths[-1], per_frame, kernels)
        self.last = RepeatConv(widths[-1], 2 * config.latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(to_channels(x, self.stem).contiguous(memory_format=torch.channels_last_3d))
        for stage in self.stages:
            x = stage(x)
        return normalized_conv(self.norm, self.last, x, self.recompute)


class Decoder(nn.Module):
    """Latents ``[B, z, f, h, w]`` to pixels ``[B, C, F, H, W]``, which are not bounded."""

    def __init__(self, config: AutoencoderConfig, recompute: str, kernels: str) -> None:
        super().__init__()
        per_frame, (f, h, w), stages = config.norm == "frame", config.stem, len(config.strides)
        self.stem = config.stem
        widths = [config.latent_channels, *(config.width * 2 ** (stages - i) for i in range(stages))]
        self.stages = nn.ModuleList(
            Stage(RepeatTransposedConv(n, after, KERNEL, stride), after, DECODER_BLOCKS, per_frame, recompute, kernels)
            for n, after, stride in zip(widths, widths[1:], config.strides)
        )
        self.last = RepeatConv(widths[-1], config.channels * f * h * w, 3)

    def forward(self, z: Tensor) -> Tensor:
        x = z.contiguous(memory_format=torch.channels_last_3d)
        for stage in self.stages:
            x = stage(x)
        return to_positions(self.last(x), self.stem)


class VideoAutoencoder(nn.Module):
    """Encodes clips as latents with mean 0 and standard deviation 1 per channel, and decodes them.

    Mean and scale are measured at the end of training (:mod:`hpdm.latent.statistics`) and stored with the weights in
    the buffers ``latent_mean`` and ``latent_std``, float32 ``[z]``. Before that latents are as the network returns
    them, and :attr:`is_measured` is false.

    Args:
        config: sizes.
        kernels: backend of the ops, ``"auto" | "reference" | "torch" | "triton"``. It never changes the parameters.
        recompute: what the backward pass computes again: ``"none"``, ``"selective"`` or ``"block"``.

    Raises:
        ValueError: an unknown ``recompute`` or backend.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: AutoencoderConfig, kernels: str = "auto", recompute: str = "none") -> None:
        super().__init__()
        check_choice("recompute", recompute, Recompute)
        check_backend(kernels)
        self.config, z = config, config.latent_channels
        self.encoder = Encoder(config, recompute, kernels)
        self.to_moments = RepeatConv(2 * z, 2 * z, 1)
        self.from_latents = RepeatConv(z, z, 1)
        self.decoder = Decoder(config, recompute, kernels)
        self.register_buffer("latent_mean", torch.zeros(z))
        self.register_buffer("latent_std", torch.zeros(z))  # 0: not measured

    @property
    def is_measured(self) -> bool:
        """Whether mean and standard deviation of the latents are known; reading it waits for the device."""
        return bool((self.latent_std > 0).all())

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of clips by way of their latents' means, which training compares with ``x``.

        Args:
            x: ``[B, C, F, H, W]`` float, pixels in [-1, 1], each size a multiple of ``config.factors``.

        Returns:
            Of the shape of ``x``.

        Raises:
            ValueError: another shape.
        """
        mean, _ = self.moments(x)
        return self.decode_unnormalized(mean)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, ``[B, z, f, h, w]`` each, as the network returns them.

        Args:
            x: as of :meth:`forward`.

        Raises:
            ValueError: as :meth:`forward`.
        """
        factors = self.config.factors
        if x.ndim != 5 or x.shape[1] != self.config.channels or 0 in x.shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected [B, {self.config.channels}, F, H, W]")
        if any(n % f for n, f in zip(x.shape[2:], factors)):
            raise ValueError(f"x: got frames, height, width {tuple(x.shape[2:])}, expected multiples of {factors}")
        mean, logvar = self.to_moments(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode_unnormalized(self, z: Tensor) -> Tensor:
        """Pixels of latents as :meth:`moments` returns them."""
        return self.decoder(self.from_latents(z))

    def encode(self, x: Tensor) -> Tensor:
        """Normalized latents of clips.

        Args:
            x: as of :meth:`forward`.

        Returns:
            ``[B, z, f, h, w]``.

        Raises:
            ValueError: as :meth:`forward`.
        """
        mean, _ = self.moments(x)
        shift, scale = self._normalization()
        return (mean - shift) / scale

    def decode(self, z: Tensor) -> Tensor:
        """Pixels of normalized latents.

        Args:
            z: ``[B, z, f, h, w]``.

        Returns:
            ``[B, C, F, H, W]``; in [-1, 1] but for errors of the network.

        Raises:
            ValueError: another shape.
        """
        if z.ndim != 5 or z.shape[1] != self.config.latent_channels or 0 in z.shape:
            raise ValueError(f"z: got shape {tuple(z.shape)}, expected [B, {self.config.latent_channels}, f, h, w]")
        shift, scale = self._normalization()
        return self.decode_unnormalized(z * scale + shift)

    def _normalization(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation ``[z, 1, 1, 1]``; 0 and 1 where they are not measured."""
        scale = torch.where(self.latent_std > 0, self.latent_std, 1.0)
        return self.latent_mean[:, None, None, None], scale[:, None, None, None]
