"""What the U-Net is told besides the noised latents: diffusion times, class or text, and which frames are known."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpdm.conditioning import check_conditioning, without_padding
from hpdm.frames import FrameTimes
from hpdm.latent.unet_blocks import FrameConv, zero_started
from hpdm.latent.unet_config import UNetConfig
from hpdm.sinusoids import NOISE_FREQUENCIES, noise_frequencies


class Conditioning(NamedTuple):
    """What the blocks are conditioned on, for B clips of T latent frames."""

    vector: Tensor
    """``[B, T, c]``, after its activation; it modulates the residual blocks."""
    text: Tensor | None
    """``[B, S, text_width]``; ``None`` without text conditioning."""
    text_mask: Tensor | None
    """``[B, S]`` bool, the tokens that may be read; ``None`` for all."""


class Conditioner(nn.Module):
    """Sums the embeddings of the frames' times and of the class, and prepares the text."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c = config.vector_width
        self.config = config
        self.time = nn.Sequential(nn.Linear(NOISE_FREQUENCIES, c), nn.SiLU(), nn.Linear(c, c))
        if config.conditioning == "class":
            # The last row stands for "no class": conditioning dropout trains it, guidance uses it.
            self.label = nn.Embedding(config.classes + 1, c)
            nn.init.normal_(self.label.weight, std=0.02)
        elif config.conditioning == "text":
            self.no_text = nn.Parameter(torch.zeros(config.text_width))

    def forward(
        self, times: Tensor, told: Tensor | None, labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None
    ) -> Conditioning:
        """Conditions B clips of T frames.

        Args:
            times: diffusion times of the frames, ``[B, T]``.
            told: more to add to the vectors, ``[B, c]``; ``None`` for nothing.
            labels: ``[B]`` int64, ``config.classes`` for none; ``None`` for no class in the whole batch.
            text: ``[B, S, text_width]``; ``None`` for no text in the batch.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: wrong shapes, or conditioning of another kind than the config's.
        """
        batch = len(times)
        check_conditioning(self.config, batch, labels, text, text_mask)
        c = self.time(noise_frequencies(times).to(cast(nn.Linear, self.time[0]).weight.dtype))  # [B, T, c]
        if told is not None:
            c = c + told[:, None]
        if self.config.conditioning == "class":
            if labels is None:
                labels = torch.full((batch,), self.config.classes, device=times.device)
            c = c + self.label(labels)[:, None]
        tokens, mask = self._text(text, text_mask, batch) if self.config.conditioning == "text" else (None, None)
        return Conditioning(F.silu(c), tokens, mask)

    def _text(self, text: Tensor | None, mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
        """Text tokens ``[B, S, text_width]`` and which may be read; without text that is one learned token."""
        if text is None:
            return self.no_text.expand(batch, 1, -1), None
        if mask is None:
            return text, None
        return without_padding(text, mask, self.no_text)


class KnownMask(nn.Module):
    """Tells which frames are known by one more input channel, and their noise level by an embedding (LVDM section 3.3).

    Known are the frames whose time differs from that of the clip; they have one time. Clips that know nothing are told
    nothing. Both maps start as zero: a network that gets them behaves as before until it is trained.

    The released code has a table with a row for each of 251 noise levels; here they are embedded as times are, so that
    they may be any.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.mask = zero_started(FrameConv(1, config.width, bias=False))
        self.level = zero_started(nn.Linear(NOISE_FREQUENCIES, config.vector_width))

    def forward(self, features: Tensor, t: Tensor, frame_t: Tensor) -> tuple[Tensor, Tensor]:
        """Tells B clips.

        Args:
            features: of the first convolution, ``[B, T, H, W, D]``.
            t: times of the clips, ``[B]``.
            frame_t: times of their frames, ``[B, T]``.

        Returns:
            Features ``[B, T, H, W, D]``, and what to add to the conditioning vector, ``[B, c]``.
        """
        known = frame_t != t[:, None]  # [B, T]
        image = known[:, :, None, None, None].expand(*features.shape[:4], 1).to(features.dtype)
        knows = known.any(dim=1)  # [B]
        level = torch.where(knows, torch.where(known, frame_t, torch.inf).amin(dim=1), 0.0)  # [B]
        told = self.level(noise_frequencies(level).to(self.level.weight.dtype)) * knows[:, None]  # [B, c]
        return features + self.mask(image.contiguous()), told


class KnownTimes(nn.Module):
    """Tells each frame its own time and the nearest known frame, by :class:`hpdm.frames.FrameTimes`.

    The residual blocks are modulated by each frame's own time besides.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.frame_times = FrameTimes(config.width, config.channels)

    def forward(self, features: Tensor, t: Tensor, frame_t: Tensor, x: Tensor) -> Tensor:
        """Tells B clips; arguments as of :meth:`KnownMask.forward`, and the noised latents ``x [B, T, H, W, z]``."""
        told: Tensor = self.frame_times(features.flatten(1, 3), t, frame_t, x.flatten(2, 3))
        return told.reshape(features.shape)
