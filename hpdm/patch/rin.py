"""The RIN block of HPDM (paper Fig. 11): latents read the tokens, think, and write back.

Sizes: tokens ``[B, N, D]``, latents ``[B, M, E]``, conditioning vector ``[B, c]``. ``B`` holds the levels of the
pyramid folded in, each with its own latent stream.

Table 8 fixes the number of parameters (178 / 321 / 725 / 3,934 M at E = 256 / 512 / 1024 / 3072). A search over block
variants leaves the one built here: MLP of ratio 4 inside each latent layer, no MLP after the read, no output projection
in the read (its values are projected from D to E already, and the self-attention right after it mixes the heads), a
token MLP of ratio 2 after the write, six adaLN modulations per latent layer and three on the token MLP.

A block is three steps: latents read tokens, latents think, tokens read latents. Everything but the stream of tokens and
the latents can be computed again in the backward pass instead of being kept, see :class:`Recompute`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpdm.patch.config import HPDMConfig
from hpdm_kernels.modules import ContextFusion, CrossAttention, SelfAttention

Recompute = Literal["none", "selective", "block"]
"""What the backward pass computes again instead of keeping it.

``"none"``: nothing.
``"selective"``: whatever has a row per token inside a block: projections, attention outputs, the hidden layer of the
token MLP. Kept are the tokens between the steps of a block and all that has a row per latent.
``"block"``: whole blocks, context fusion included. Kept are the tokens and latents between blocks.
"""

CHUNK_ROWS, CHUNKS = 8192, 8
"""Tokens that are recomputed at a time: about 8192 rows, more where that would be over 8 pieces."""


def recomputed(fn: Callable[..., Any], *inputs: Any) -> Any:
    """``fn(*inputs)``, of which the backward pass keeps the inputs alone. Nothing in the model is random."""
    if not torch.is_grad_enabled():
        return fn(*inputs)
    return checkpoint(fn, *inputs, use_reentrant=False, preserve_rng_state=False)


class Modulation(nn.Module):
    """``count`` vectors of ``width`` from the conditioning vector; zero at the start (adaLN-Zero)."""

    def __init__(self, conditioning_width: int, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(conditioning_width, count * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """``c [B, c]``, after its activation -> ``count`` tensors ``[B, 1, width]``."""
        return self.linear(c)[:, None].chunk(self.count, dim=-1)


def mlp(width: int, ratio: int) -> nn.Sequential:
    """Linear, GELU, Linear."""
    return nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(approximate="tanh"), nn.Linear(ratio * width, width))


class SelfConditioning(nn.Module):
    """Latents that start from what an earlier pass found: ``z + LN_0(MLP(stopgrad z_prev))`` (RIN, Jabri et al. 2023).

    The scale of ``LN_0`` starts at zero, so a new model starts as if there were none.
    """

    def __init__(self, config: HPDMConfig) -> None:
        super().__init__()
        self.mlp = mlp(config.latent_width, config.latent_mlp_ratio)
        self.norm = nn.LayerNorm(config.latent_width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, z: Tensor, previous: Tensor) -> Tensor:
        """``z [M, E]``, ``previous [B, M, E]`` (or sizes of 1 for B and M) -> ``[B, M, E]``."""
        return z + self.norm(self.mlp(previous.detach()))


class LatentLayer(nn.Module):
    """Self-attention and MLP on the latents, both modulated by the conditioning vector."""

    def __init__(self, config: HPDMConfig, kernels: str) -> None:
        super().__init__()
        width = config.latent_width
        self.modulation = Modulation(config.conditioning_width, width, 6)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, head_width=config.head_width, backend=kernels)
        self.mlp = mlp(width, config.latent_mlp_ratio)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """``z [B, M, E]``, ``c [B, c]`` -> ``[B, M, E]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        z = torch.addcmul(z, gate1, self.attention(torch.addcmul(shift1, self.norm(z), 1 + scale1)))
        return torch.addcmul(z, gate2, self.mlp(torch.addcmul(shift2, self.norm(z), 1 + scale2)))


class RINBlock(nn.Module):
    """Fuse, read, think, write (paper Fig. 2 and 11).

    Args:
        config: sizes.
        levels: levels that this block serves; a block for level 0 alone has no fusion weights.
        kernels: backend of the ops.
        recompute: what the backward pass computes again inside the block; see :data:`Recompute`.
    """

    def __init__(self, config: HPDMConfig, levels: int, kernels: str, recompute: Recompute = "none") -> None:
        super().__init__()
        d, e, c = config.width, config.latent_width, config.conditioning_width
        self.levels = levels
        self.recompute = recompute
        self.fusion = (
            ContextFusion(d, coordinates=config.coordinates, backend=kernels)
            if levels > 1 and config.fusion == "deep"
            else None
        )
        self.read_norm = nn.LayerNorm(e)
        # Keys and values of the cross-attentions are not layer-normed, queries are (as in RIN).
        self.read = CrossAttention(e, d, e, None, head_width=config.head_width, backend=kernels)
        self.layers = nn.ModuleList(LatentLayer(config, kernels) for _ in range(config.latent_layers))
        self.write_norm = nn.LayerNorm(d)
        self.write = CrossAttention(d, e, e, d, head_width=config.head_width, backend=kernels)
        self.token_modulation = Modulation(c, d, 3)
        self.token_norm = nn.LayerNorm(d, elementwise_affine=False)
        self.token_mlp = mlp(d, config.token_mlp_ratio)

    def forward(
        self, x: Tensor, z: Tensor, c: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything after the fusion.

        Args:
            x: tokens ``[B, N, D]``, fused already.
            z: latents ``[B, M, E]``.
            c: conditioning vector ``[B, c]`` after its activation.
            text: text tokens ``[B, S, D]`` that the latents read beside the video's, or ``None``.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.

        Returns:
            Tokens ``[B, N, D]`` and latents ``[B, M, E]``.
        """
        if self.recompute == "none":
            z = self._think(self._read(x, z, text, text_mask), c)
            return self._write(x, z, *self.token_modulation(c)), z
        # With kernels on, the read recomputes what has a row per token by itself, and its attention not at all.
        plain = self.read.backend == "reference"
        given = (x, z, text, text_mask)
        z = self._think(recomputed(self._read, *given) if plain else self._read(*given), c)
        # A token's way through the write depends on no other token, so a few of them at a time are enough.
        rows = max(CHUNK_ROWS // x.shape[0], -(-x.shape[1] // CHUNKS))
        vectors = self.token_modulation(c)
        written = [recomputed(self._write, piece, z, *vectors) for piece in x.split(rows, dim=1)]
        return (written[0] if len(written) == 1 else torch.cat(written, dim=1)), z

    def _read(self, x: Tensor, z: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        tokens = x if text is None else (x, text)
        # All of the video may be read, and of a batch of texts what is not padding.
        mask = None if text_mask is None else torch.cat((text_mask.new_ones(x.shape[:2]), text_mask), dim=1)
        return z + self.read(self.read_norm(z), tokens, key_mask=mask, recompute=self.recompute != "none")

    def _think(self, z: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z, c)
        return z

    def _write(self, x: Tensor, z: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        x = x + self.write(self.write_norm(x), z)
        return torch.addcmul(x, gate, self.token_mlp(torch.addcmul(shift, self.token_norm(x), 1 + scale)))
