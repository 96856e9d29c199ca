"""The RIN block of HPDM (paper Fig. 11): latents read tokens, attend to each other ("think"), and tokens read latents.

Sizes: tokens ``[B, N, D]``, latents ``[B, M, E]``, conditioning vector ``[B, c]``. The batch ``B`` includes the levels
of the pyramid; each level has its own latents.

The paper does not give every detail of the block, but Table 8 gives the number of parameters (178 / 321 / 725 / 3,934 M
at E = 256 / 512 / 1024 / 3072). This is the variant that matches it: an MLP of ratio 4 in each latent layer,
no MLP after the read, no output projection in the read (its values are already projected from D to E, and the
self-attention that follows mixes the heads), a token MLP of ratio 2 after the write, six adaLN modulations per latent
layer and three on the token MLP.

Its backward pass can compute most activations again, see :mod:`hpdm.recompute`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpdm.patch.config import HPDMConfig
from hpdm.patch.sinusoidal_fusion import SinusoidalFusion
from hpdm.recompute import Recompute, recomputed, recomputed_but_products
from hpdm_kernels import gated_residual, modulated_norm
from hpdm_kernels.modules import MLP, ContextFusion, CrossAttention, SelfAttention

CHUNK_ROWS, CHUNKS = 8192, 8
"""The write is recomputed in chunks of about 8192 tokens; of more tokens where that would make more than 8 chunks."""


class Modulation(nn.Module):
    """``count`` vectors of ``width`` channels from the conditioning vector; zero at initialization (adaLN-Zero)."""

    def __init__(self, conditioning_width: int, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(conditioning_width, count * width)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """``c [B, c]``, already activated -> ``count`` tensors ``[B, width]``."""
        return self.linear(c).chunk(self.count, dim=-1)  # count x [B, width]


class SelfConditioning(nn.Module):
    """Latent self-conditioning (RIN, Jabri et al. 2023): initial latents ``z + LN_0(MLP(stopgrad z_prev))``.

    ``z_prev`` are the final latents of an earlier pass. The scale of ``LN_0`` is zero at initialization, so a new model
    behaves like one without self-conditioning.
    """

    def __init__(self, config: HPDMConfig, kernels: str) -> None:
        super().__init__()
        self.mlp = MLP(config.latent_width, config.latent_mlp_ratio, backend=kernels)
        self.norm = nn.LayerNorm(config.latent_width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, z: Tensor, previous: Tensor) -> Tensor:
        """``z [M, E]``, ``previous [B, M, E]`` (or sizes of 1 for B and M) -> ``[B, M, E]``."""
        return z + self.norm(self.mlp(previous.detach()))  # [B, M, E]


class LatentLayer(nn.Module):
    """Self-attention and MLP on the latents, both modulated by the conditioning vector (adaLN).

    What a layer adds to the latents at its end is left to the norm of the next one, which reads them anyway: a layer
    takes and returns latents and the branch, with its gate, that is yet to be added.
    """

    def __init__(self, config: HPDMConfig, kernels: str) -> None:
        super().__init__()
        width = config.latent_width
        self.kernels = kernels
        self.modulation = Modulation(config.conditioning_width, width, 6)
        self.attention = SelfAttention(width, head_width=config.head_width, backend=kernels)
        self.mlp = MLP(width, config.latent_mlp_ratio, backend=kernels)

    def forward(self, z: Tensor, branch: Tensor, gate: Tensor | None, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``z [B, M, E]``, ``branch [B, M, E]``, ``gate [B, E]`` or ``None`` for 1, ``c [B, c]`` -> z, branch, gate."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)  # [B, E] each
        z, normal = modulated_norm(z, shift1, scale1, branch, gate, backend=self.kernels)  # [B, M, E] both
        attended = self.attention(normal)  # [B, M, E]
        z, normal = modulated_norm(z, shift2, scale2, attended, gate1, backend=self.kernels)  # [B, M, E] both
        return z, self.mlp(normal), gate2


def make_fusion(config: HPDMConfig, kernels: str) -> ContextFusion:
    """The context fusion of a block, with the coordinates that ``config`` gives it."""
    if config.coordinate_embedding == "sinusoidal":
        return SinusoidalFusion(config.width, backend=kernels)
    return ContextFusion(config.width, coordinates=config.coordinates, backend=kernels)


class RINBlock(nn.Module):
    """Read, think, write (paper Fig. 2 and 11), and the weights of the context fusion before them.

    Args:
        config: sizes.
        levels: the block serves levels ``0 .. levels - 1``; a block of level 0 alone has no fusion weights.
        kernels: backend of the ops.
        recompute: what the backward pass computes again; see :data:`hpdm.recompute.Recompute`.
        shared: another block, which computes everything after the fusion in place of this one (appendix D.4); this one
            then has no parameters but those of its fusion. ``None`` for a block with weights of its own.
    """

    def __init__(
        self, config: HPDMConfig, levels: int, kernels: str, recompute: Recompute = "none",
        shared: RINBlock | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        d, e, c = config.width, config.latent_width, config.conditioning_width
        self.levels = levels
        self.kernels = kernels
        self.recompute = recompute
        self._part: Callable[..., Any] = recomputed if recompute == "block" else recomputed_but_products
        self.fusion = make_fusion(config, kernels) if levels > 1 and config.fusion == "deep" else None
        # In a tuple, so that PyTorch does not take the other block's parameters for this one's too.
        self._shared = () if shared is None else (shared,)
        if shared is not None:
            return
        self.read_norm = nn.LayerNorm(e)
        # Keys and values of the cross-attentions are not layer-normed, queries are (as in RIN).
        self.read = CrossAttention(e, d, e, None, head_width=config.head_width, backend=kernels)
        self.layers = nn.ModuleList(LatentLayer(config, kernels) for _ in range(config.latent_layers))
        self.write_norm = nn.LayerNorm(d)
        self.write = CrossAttention(d, e, e, d, head_width=config.head_width, backend=kernels)
        self.token_modulation = Modulation(c, d, 3)
        self.token_mlp = MLP(d, config.token_mlp_ratio, backend=kernels)

    def forward(
        self, x: Tensor, z: Tensor, c: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything after the fusion.

        Args:
            x: tokens ``[B, N, D]``, already fused.
            z: latents ``[B, M, E]``.
            c: conditioning vector ``[B, c]``, already activated.
            text: text tokens ``[B, S, D]`` that the latents read along with the video's, or ``None``.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.

        Returns:
            Tokens ``[B, N, D]`` and latents ``[B, M, E]``.
        """
        for block in self._shared:
            return block(x, z, c, text, text_mask)
        # The kernels of the read recompute per-token activations themselves; the reference formulas need a checkpoint.
        keep = self.recompute == "none"
        read = self._read if keep or self.read.backend != "reference" else self._checkpointed_read
        branch, gate = read(x, z, text, text_mask), None  # [B, M, E]
        for layer in self.layers:
            z, branch, gate = layer(z, branch, gate, c) if keep else self._part(layer, z, branch, gate, c)
        z = z + branch if gate is None else gated_residual(z, branch, gate, backend=self.kernels)  # [B, M, E]
        if not keep:
            return self._checkpointed_write(x, z, c), z  # [B, N, D], [B, M, E]
        return self._write(x, self.write.keys_and_values(z), *self.token_modulation(c)), z  # [B, N, D], [B, M, E]

    def _read(self, x: Tensor, z: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """Latents ``[B, M, E]`` attend to tokens ``[B, N, D]`` and text ``[B, S, D]``: what is added to them."""
        tokens = x if text is None else (x, text)
        # Every token of the video may be read, and every token of a text that is not padding.
        mask = None
        if text_mask is not None:
            mask = torch.cat((text_mask.new_ones(x.shape[:2]), text_mask), dim=1)  # [B, N + S]
        return self.read(self.read_norm(z), tokens, key_mask=mask, recompute=self.recompute != "none")

    def _checkpointed_read(self, x: Tensor, z: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """:meth:`_read`, computed again in the backward pass."""
        return recomputed(self._read, x, z, text, text_mask)

    def _write(self, x: Tensor, latents: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Tokens ``[B, N, D]`` attend to latents, then a token MLP modulated by three ``[B, D]``.

        ``latents [B, M, 2E]`` are their keys and values.
        """
        written = self.write.attend(self.write_norm(x), latents)  # [B, N, D]
        x, normal = modulated_norm(x, shift, scale, written, backend=self.kernels)  # [B, N, D] both
        return gated_residual(x, self.token_mlp(normal), gate, backend=self.kernels)

    def _checkpointed_write(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """:meth:`_write`, computed again in the backward pass, chunk by chunk: tokens do not depend on each other."""
        size = max(CHUNK_ROWS // x.shape[0], -(-x.shape[1] // CHUNKS))
        same = self.write.keys_and_values(z), *self.token_modulation(c)
        written = [self._part(self._write, chunk, *same) for chunk in x.split(size, dim=1)]
        return written[0] if len(written) == 1 else torch.cat(written, dim=1)  # [B, N, D]
