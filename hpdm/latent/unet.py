"""The network of latent video diffusion: a U-Net whose convolutions and attention work in space or in time, never both.

LVDM section 3.2: convolutions of (1, 3, 3), spatial and temporal attention in turn, adaptive group normalization. Sizes
and order are those of the released code, which is a U-Net for images (Dhariwal and Nichol 2021) with temporal attention
after every spatial one. Time is never resampled.

Sizes: batch B, latent frames T of ``H x W`` with z numbers each, D channels on the first level.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpdm.checks import check_choice, check_shape
from hpdm.latent.temporal_attention import TemporalAttention
from hpdm.latent.unet_blocks import (
    FrameConv,
    ResidualBlock,
    SpatialAttention,
    TextAttention,
    VideoNorm,
    doubled,
    zero_started,
)  # fmt: skip
from hpdm.latent.unet_conditioner import Conditioner, Conditioning, KnownMask, KnownTimes
from hpdm.latent.unet_config import UNetConfig
from hpdm.recompute import Recompute, recomputed, recomputed_but_products
from hpdm_kernels.modules import check_backend


class Block(nn.Module):
    """A residual block and, on levels that have attention, attention in space, to the text if there is one, in time."""

    def __init__(self, config: UNetConfig, inputs: int, outputs: int, attention: bool, kernels: str) -> None:
        super().__init__()
        heads, groups = config.heads, config.groups
        self.residual = ResidualBlock(inputs, outputs, config.vector_width, groups, config.norm, kernels)
        self.spatial = SpatialAttention(outputs, heads, groups, kernels) if attention else None
        reads = attention and config.conditioning == "text"
        self.text = TextAttention(outputs, config.text_width, heads, groups, kernels) if reads else None
        self.temporal = TemporalAttention(outputs, heads, groups, config.farthest, kernels) if attention else None

    def forward(self, x: Tensor, vector: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        """``x [B, T, H, W, C]`` -> ``[B, T, H, W, C']``; the others as of :class:`Conditioning`."""
        x = self.residual(x, vector)
        if self.spatial is not None:
            x = self.spatial(x)
        if self.text is not None and text is not None:
            x = self.text(x, text, text_mask)
        return x if self.temporal is None else self.temporal(x)


class Level(nn.Module):
    """The blocks of one level on the way down or up, and what changes the resolution after them."""

    def __init__(self, blocks: list[Block], resample: FrameConv | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class FactorizedUNet(nn.Module):
    """Predicts v or the noise of noised latents; a new one predicts 0.

    Args:
        config: sizes and variants; see :mod:`hpdm.latent.unet_presets`.
        kernels: backend of every op, ``"auto" | "reference" | "torch" | "triton"``. It changes neither the parameters
            nor, apart from rounding, the results.
        recompute: what the backward pass computes again instead of keeping it: nothing (``"none"``), normalizations,
            activations and temporal attention (``"selective"``), or everything inside of a block (``"block"``). It
            trades time for memory; the results change only by rounding.
        kernels: backend of the ops, ``"auto" | "reference" | "torch" | "triton"``. It never changes the parameters.

    Raises:
        ValueError: unknown backend or recompute setting.
    """

    def __init__(self, config: UNetConfig, kernels: str = "auto", recompute: str = "none") -> None:
        super().__init__()
        check_backend(kernels)
        self.config = config
        self.kernels = check_backend(kernels)
        self.recompute: Recompute = check_choice("recompute", recompute, Recompute)
        self.conditioner = Conditioner(config)
        self.known_mask = KnownMask(config) if config.known == "mask" else None
        self.known_times = KnownTimes(config) if config.known == "times" else None
        self.sparse = nn.Parameter(torch.zeros(config.vector_width)) if config.spacing > 1 else None
        self.first = FrameConv(config.channels, config.width)
        widths, last = config.widths, len(config.widths) - 1
        has_attention = [factor in config.attention for factor in config.factors]
        # Channels of everything that the way up gets from the way down.
        skips, channels = [config.width], config.width
        self.down = nn.ModuleList()
        for level, (width, attention) in enumerate(zip(widths, has_attention)):
            blocks = [Block(config, width if b else channels, width, attention, kernels) for b in range(config.blocks)]
            self.down.append(Level(blocks, FrameConv(width, width, stride=2) if level < last else None))
            channels = width
            skips += [width] * (config.blocks + (level < last))
        self.middle = nn.ModuleList(
            Block(config, channels, channels, attention, kernels) for attention in (True, False)
        )
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            blocks = []
            for _ in range(config.blocks + 1):
                blocks.append(Block(config, channels + skips.pop(), widths[level], has_attention[level], kernels))
                channels = widths[level]
            self.up.append(Level(blocks, FrameConv(channels, channels) if level else None))
        self.out_norm = VideoNorm(config.groups, channels, config.norm, kernels)
        self.out_conv = zero_started(FrameConv(channels, config.channels))

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, text: Tensor | None = None,
        text_mask: Tensor | None = None, *, frame_t: Tensor | None = None, sparse: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Predicts what the config says of B clips of latents.

        Args:
            x: noised latents ``[B, z, T, H, W]``, of unit variance (:func:`hpdm.process.mixture`); any number of
                frames, H and W multiples of ``config.smallest``.
            t: diffusion times ``[B]`` in [0, 1].
            labels: ``[B]`` int64 class labels, ``config.classes`` for none; ``None`` for no class in the whole batch.
            text: embeddings ``[B, S, text_width]``; ``None`` for no text in the batch.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere. A sample without text has a row
                of false.
            frame_t: for a network with known frames, the time of each frame ``[B, T]``, for which ``x`` is noised.
                Frames whose time differs from ``t`` are known. ``None``: none is.
            sparse: for a network with a spacing, the clips whose frames are far apart, bool ``[B]``. ``None``: none is.

        Returns:
            ``[B, z, T, H, W]``.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: shapes that do not match the config, conditioning of another kind than the config's, times of
                frames for a network without known frames, or ``sparse`` for one without a spacing.
        """
        self._check(x, t, frame_t, sparse)
        x = x.movedim(1, -1).contiguous()  # [B, T, H, W, z]
        features: Tensor = self.first(x)  # [B, T, H, W, D]
        times, told = t[:, None].expand(x.shape[:2]), None
        if frame_t is not None and self.known_mask is not None:
            features, told = self.known_mask(features, t, frame_t)
        if frame_t is not None and self.known_times is not None:
            features, times = self.known_times(features, t, frame_t, x), frame_t
        if sparse is not None and self.sparse is not None:
            apart = sparse[:, None] * self.sparse  # [B, c]
            told = apart if told is None else told + apart
        conditioning = self.conditioner(times, told, labels, text, text_mask)
        out = self._run_levels(features, conditioning)
        out = self.out_conv(self.out_norm(out, act="silu"))
        return out.movedim(-1, 1)

    def compiled_modules(self) -> list[nn.Module]:
        """The modules to compile one by one where the whole network cannot be, as with FSDP."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def sharded_modules(self) -> list[tuple[nn.Module, bool]]:
        """The modules that FSDP shards on their own, in the order of their calls.

        The flag says whether to reshard a module's weights after its forward: not those of the last one, whose backward
        pass comes next.
        """
        blocks = self.compiled_modules()
        return [(block, block is not blocks[-1]) for block in blocks]

    def _run_levels(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Down, through the middle and up: ``[B, T, H, W, D] -> [B, T, H, W, D']``."""
        skips = [x]
        for level in cast(list[Level], list(self.down)):
            for block in level.blocks:
                x = self._run_block(block, x, conditioning)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        for block in self.middle:
            x = self._run_block(block, x, conditioning)
        for level in cast(list[Level], list(self.up)):
            for block in level.blocks:
                x = self._run_block(block, torch.cat((x, skips.pop()), dim=-1), conditioning)
            if level.resample is not None:
                x = level.resample(doubled(x))
        return x

    def _run_block(self, block: nn.Module, x: Tensor, conditioning: Conditioning) -> Tensor:
        """One block, with what :attr:`recompute` says."""
        if self.recompute == "none":
            out: Tensor = block(x, *conditioning)
            return out
        part: Callable[..., Any] = recomputed if self.recompute == "block" else recomputed_but_products
        out = part(block, x, *conditioning)
        return out

    def _check(self, x: Tensor, t: Tensor, frame_t: Tensor | None, sparse: Tensor | None) -> None:
        """Checks the inputs; raises as :meth:`forward`."""
        cfg = self.config
        if x.ndim != 5 or x.shape[1] != cfg.channels or any(n < 1 or n % cfg.smallest for n in x.shape[3:]):
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected (B, {cfg.channels}, T, H, W) with H and W multiples of "
                f"{cfg.smallest}"
            )
        check_shape("t", t, (len(x),))
        if frame_t is not None:
            if cfg.known == "none":
                raise ValueError("frame_t: got a tensor, expected None for a network without known frames")
            check_shape("frame_t", frame_t, (len(x), x.shape[2]))
        if sparse is not None:
            if cfg.spacing == 1:
                raise ValueError("sparse: got a tensor, expected None for a network without a spacing")
            check_shape("sparse", sparse, (len(x),))
