"""Conditioning of the network: noise level, pyramid level, and class or text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpdm.conditioning import check_conditioning, without_padding
from hpdm.patch.config import HPDMConfig
from hpdm.sinusoids import NOISE_FREQUENCIES, noise_frequencies


class Conditioning(NamedTuple):
    """What the blocks are conditioned on, for a batch of R rows."""

    vector: Tensor
    """``[R, c]``, after its activation; modulates the blocks (adaLN)."""
    text: Tensor | None
    """``[R, S, D]`` text tokens that the latents read; ``None`` without text conditioning."""
    text_mask: Tensor | None
    """``[R, S]`` bool, the text tokens that may be read; ``None`` for all."""

    def first(self, rows: int) -> Conditioning:
        """The conditioning of the first rows."""
        vector, text, mask = self
        return Conditioning(vector[:rows], None if text is None else text[:rows], None if mask is None else mask[:rows])


class Conditioner(nn.Module):
    """Sums embeddings of noise level, pyramid level and class or text into one vector, and embeds text tokens.

    The blocks are shared by the levels, and the paper does not say how they know the level that they work on. Here a
    learned vector per level is added.
    """

    def __init__(self, config: HPDMConfig) -> None:
        super().__init__()
        c = config.conditioning_width
        self.config = config
        self.noise = nn.Sequential(nn.Linear(NOISE_FREQUENCIES, c), nn.SiLU(), nn.Linear(c, c))
        self.level = nn.Embedding(config.levels, c)
        if config.conditioning == "class":
            # The last row stands for "no class": conditioning dropout trains it, guidance uses it.
            self.label = nn.Embedding(config.classes + 1, c)
        elif config.conditioning == "text":
            self.text = nn.Linear(config.text_width, config.width)
            self.no_text = nn.Parameter(torch.zeros(config.width))
            self.pooled = nn.Linear(config.width, c)

    def forward(
        self, t: Tensor, levels: Tensor, labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None
    ) -> Conditioning:
        """Conditions B samples on each of n levels.

        Args:
            t: diffusion times ``[n, B]``.
            levels: ``[n]`` int64.
            labels: ``[B]`` int64; ``None`` for no class.
            text: ``[B, S, text_width]``; ``None`` for no text.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.

        Returns:
            Conditioning of ``n * B`` rows, level-major.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: wrong shapes, or conditioning of another kind than the config's.
        """
        count, batch = t.shape
        check_conditioning(self.config, batch, labels, text, text_mask)
        row_levels = levels.repeat_interleave(batch)  # [n * B]
        frequencies = noise_frequencies(t.flatten()).to(self.level.weight.dtype)  # [n * B, 256]
        c = self.noise(frequencies) + self.level(row_levels)  # [n * B, c]
        tokens, mask = None, None  # stay None without text
        if self.config.conditioning == "class":
            if labels is None:
                labels = levels.new_full((batch,), self.config.classes)  # [B]
            c = c + self.label(labels.repeat(count))  # [n * B, c]
        elif self.config.conditioning == "text":
            tokens, mask = self._embed_text(text, text_mask, batch)  # [B, S, D], [B, S]
            c = c + self._pool_text(tokens, mask).repeat(count, 1)  # [n * B, c]
            if count > 1:
                tokens = tokens.repeat(count, 1, 1)  # [n * B, S, D]
                mask = None if mask is None else mask.repeat(count, 1)  # [n * B, S]
        return Conditioning(nn.functional.silu(c), tokens, mask)

    def _embed_text(self, text: Tensor | None, mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
        """Text embeddings ``[B, S, text_width]`` -> text tokens ``[B, S, D]`` and a mask of those that may be read.

        A sample without text may read one token, the learned "no text"; ``text=None`` is a batch of such samples.
        """
        if text is None:
            return self.no_text.expand(batch, 1, -1), None
        tokens = self.text(text)  # [B, S, D]
        if mask is None:
            return tokens, None
        return without_padding(tokens, mask, self.no_text)

    def _pool_text(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Projected mean of the text tokens that may be read, ``[B, S, D] -> [B, c]``."""
        if mask is None:
            return self.pooled(tokens.mean(dim=1))
        return self.pooled((tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
