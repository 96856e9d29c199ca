"""The network: tokenizer, RIN blocks with deep context fusion and adaptive computation, detokenizer (paper Fig. 2).

Two ways in, one set of blocks: :meth:`HPDM.forward` takes one patch of every level (training),
:meth:`HPDM.forward_level` takes patches of one level and the features of the finished levels below it (sampling), which
:meth:`HPDM.level_features` gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, overload

import torch
from einops import rearrange
from torch import Tensor, nn

from hpdm.patch.config import HPDMConfig, check_choice
from hpdm.patch.rin import Modulation, Recompute, RINBlock, SelfConditioning, recomputed
from hpdm_kernels import footprint_size, sample_patches
from hpdm_kernels._backend import check_backend
from hpdm_kernels.reference import coordinate_dtype, relative_box

NOISE_FREQUENCIES = 256


@dataclass(frozen=True)
class Context:
    """What the finished levels below give to patches of one level.

    Attributes:
        features: per block that fuses for this level, its projected inputs ``[T_k, N, D]`` of every level ``k`` below,
            as :meth:`HPDM.level_features` returns them.
        pixels: finished clean patches of the previous level ``[T, C, f, h, w]``, for shallow fusion alone.
        boxes: a tuple over the levels below of boxes ``[T_k, 6]``.
        index: ``[B, levels below]`` int64, the row of each source that serves a sample.
    """

    features: dict[int, tuple[Tensor, ...]]
    pixels: Tensor | None
    boxes: tuple[Tensor, ...]
    index: Tensor


def noise_frequencies(t: Tensor) -> Tensor:
    """Sinusoids of the diffusion time, at least in fp32: ``[B] -> [B, 256]``."""
    t = t.to(coordinate_dtype(t.dtype))
    half = NOISE_FREQUENCIES // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(1e4) / half))
    angles = 1000 * t[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def axis_sinusoids(n: int, width: int, axis: int) -> Tensor:
    """Where the position table of one axis starts: ``[n, width]``, sinusoids on the axis' own third of the channels.

    At the size of the normalised tokens, so that the latents can tell places apart from the first step on.
    """
    table = torch.zeros(n, width)
    channels = torch.arange(axis, width, 3)
    wave = torch.arange(len(channels)) // 2
    frequency = (0.5 * math.pi) * torch.exp(-math.log(4.0 * n) * wave / max(1, len(channels) // 2))
    angle = torch.arange(n)[:, None] * frequency
    table[:, channels] = torch.where(torch.arange(len(channels)) % 2 == 0, angle.sin(), angle.cos())
    return table


def _fold(levels: Sequence[Tensor]) -> Tensor:
    """Levels into the batch, level-major; a single one is not copied."""
    return levels[0] if len(levels) == 1 else torch.cat(list(levels))


class Conditioner(nn.Module):
    """Noise level, pyramid level and class or text, summed into one vector.

    The paper's blocks are shared by the levels and do not say how a level knows itself; a learned vector per level,
    added here, does.
    """

    def __init__(self, config: HPDMConfig) -> None:
        super().__init__()
        c = config.conditioning_width
        self.kind = config.conditioning
        self.noise = nn.Sequential(nn.Linear(NOISE_FREQUENCIES, c), nn.SiLU(), nn.Linear(c, c))
        self.level = nn.Embedding(config.levels, c)
        if self.kind == "class":
            self.classes = config.classes
            # One row more, for "no class": what dropout trains and guidance uses.
            self.label = nn.Embedding(config.classes + 1, c)
        elif self.kind == "text":
            self.text = nn.Linear(config.text_width, config.width)
            self.no_text = nn.Parameter(torch.zeros(config.width))
            self.pooled = nn.Linear(config.width, c)

    def embed_text(self, text: Tensor | None, mask: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
        """T5 embeddings ``[B, S, text_width]`` -> tokens ``[B, S, D]`` and which of them may be read.

        A sample without text has one token that may be, the learned "no text"; so have all for ``text=None``.
        """
        if text is None:
            return self.no_text.expand(batch, 1, -1), None
        tokens = self.text(text)
        if mask is None:
            return tokens, None
        # Padding becomes that token too; of a sample without text the first one may be read.
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        visible = mask | (first & ~mask.any(dim=1, keepdim=True))
        return torch.where(mask[..., None], tokens, self.no_text), visible

    def pool_text(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Mean of the text tokens that may be read, ``[B, S, D] -> [B, c]``."""
        if mask is None:
            return self.pooled(tokens.mean(dim=1))
        return self.pooled((tokens * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))

    def forward(self, t: Tensor, level: Tensor, labels: Tensor | None, text: Tensor | None) -> Tensor:
        """Times ``[B]``, levels ``[B]``, labels ``[B]``, pooled texts ``[B, c]`` -> ``[B, c]``, activated."""
        c = self.noise(noise_frequencies(t).to(self.level.weight.dtype)) + self.level(level)
        if self.kind == "class":
            labels = torch.full_like(level, self.classes) if labels is None else labels
            c = c + self.label(labels)
        if text is not None:
            c = c + text
        return nn.functional.silu(c)


class HPDM(nn.Module):
    """Hierarchical Patch Diffusion Model (CVPR 2024).

    Args:
        config: sizes, pyramid and ablation switches; see :mod:`hpdm.patch.presets`.
        kernels: backend of every op, ``"auto" | "reference" | "torch" | "triton"``. It changes neither the parameters
            nor the ``state_dict``, and the results only by rounding.
        recompute: what the backward pass computes again instead of keeping it, ``"none" | "selective" | "block"``, see
            :data:`hpdm.patch.rin.Recompute`; memory against time, results the same up to rounding.

    Raises:
        ValueError: unknown backend or recompute setting.
    """

    def __init__(self, config: HPDMConfig, kernels: str = "auto", recompute: str = "none") -> None:
        super().__init__()
        self.config = config
        self.kernels = check_backend(kernels)
        self.recompute: Recompute = check_choice("recompute", recompute, Recompute)
        f, h, w = config.grid
        inputs = config.channels * (2 if config.fusion == "shallow" else 1)
        self.tokenizer = nn.Linear(inputs * math.prod(config.tokenizer), config.width)
        self.tokenizer_norm = nn.LayerNorm(config.width)
        # Positions inside the patch, one table per axis. Where the patch lies comes by the coordinates of the fusion.
        self.position_f = nn.Parameter(torch.empty(f, 1, 1, config.width))
        self.position_h = nn.Parameter(torch.empty(1, h, 1, config.width))
        self.position_w = nn.Parameter(torch.empty(1, 1, w, config.width))
        self.latents = nn.Parameter(torch.empty(config.latents, config.latent_width))
        self.self_conditioning = SelfConditioning(config) if config.self_conditioning else None
        self.conditioner = Conditioner(config)
        self.blocks = nn.ModuleList(RINBlock(config, n, kernels, self.recompute) for n in config.levels_per_block)
        self.out_norm = nn.LayerNorm(config.width)
        self.detokenizer = nn.Linear(config.width, config.channels * math.prod(config.tokenizer))
        self.initialise()

    @property
    def rin_blocks(self) -> list[RINBlock]:
        """The blocks with their type, which ``nn.ModuleList`` forgets."""
        return cast(list[RINBlock], list(self.blocks))

    def initialise(self) -> None:
        """Xavier for linear maps; modulations and the detokenizer start at zero, so that blocks start gentle."""
        modulations: list[Modulation] = []
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, Modulation):
                modulations.append(module)
        for modulation in modulations:
            nn.init.zeros_(modulation.linear.weight)
        nn.init.zeros_(self.detokenizer.weight)
        nn.init.normal_(self.latents, std=0.02)
        with torch.no_grad():
            for axis, table in enumerate((self.position_f, self.position_h, self.position_w)):
                table.copy_(
                    axis_sinusoids(table.numel() // self.config.width, self.config.width, axis).reshape(table.shape)
                )

    def forward(
        self, x: Tensor, boxes: Tensor, t: Tensor, labels: Tensor | None = None, text: Tensor | None = None,
        text_mask: Tensor | None = None, *, latents: Tensor | None = None, return_latents: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Predicts v for one patch of every level, jointly (paper eq. 4).

        Args:
            x: noised patches ``[B, L, C, f, h, w]`` (see :mod:`hpdm.process`).
            boxes: ``[B, L, 6]`` float32, nested.
            t: diffusion times ``[B, L]`` in [0, 1].
            labels: ``[B]`` int64 class labels, ``config.classes`` for none; ``None`` for no class in the whole batch.
            text: embeddings ``[B, S, text_width]``, see :mod:`hpdm.text`; ``None`` for no text in the batch.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere. A row of false is a sample
                without text. What the mask hides changes nothing, nor does how much of it there is (up to rounding).
            latents: ``[B, L, M, E]`` of an earlier pass over the same patches, for a model with self-conditioning;
                ``None``, or zeros for a sample, where there was none. They get no gradient.
            return_latents: also return those that this pass ends with, ``[B, L, M, E]``.

        Returns:
            ``[B, L, C, f, h, w]``, with ``return_latents`` a pair.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: shapes that do not match the config, or conditioning of another kind than the config's.
        """
        cfg = self.config
        batch = x.shape[0]
        self._check("x", x, (batch, cfg.levels, cfg.channels, *cfg.patch))
        self._check("boxes", boxes, (batch, cfg.levels, 6))
        self._check("t", t, (batch, cfg.levels))
        text, text_mask, pooled = self._conditioning(labels, text, text_mask, batch)
        # Levels are folded level-major, so that "the first n levels" is a slice.
        level = torch.arange(cfg.levels, device=x.device).repeat_interleave(batch)
        c = self.conditioner(
            t.transpose(0, 1).flatten(),
            level,
            None if labels is None else labels.repeat(cfg.levels),
            None if pooled is None else pooled.repeat(cfg.levels, 1),
        )
        text = None if text is None else text.repeat(cfg.levels, 1, 1)
        text_mask = None if text_mask is None else text_mask.repeat(cfg.levels, 1)
        box = boxes.unbind(1)
        rgb = list(x.unbind(1))
        if cfg.fusion == "shallow":
            upsampled = [torch.zeros_like(rgb[0])] + [
                self._upsample(rgb[n - 1].detach() if cfg.detach_context else rgb[n - 1], box[n], box[n - 1])
                for n in range(1, cfg.levels)
            ]
            rgb = [torch.cat(pair, dim=1) for pair in zip(rgb, upsampled)]
        keep = self.recompute == "none"
        tokens = [self._tokenize(patch) if keep else recomputed(self._tokenize, patch) for patch in rgb]
        z = [self._start(batch, None if latents is None else latents[:, n]) for n in range(cfg.levels)]
        whole_blocks = self.recompute == "block"
        for block in self.rin_blocks:
            n = block.levels
            rows = slice(n * batch)
            inputs = (
                block, tokens[:n], z[:n], c[rows], box[:n],
                None if text is None else text[rows], None if text_mask is None else text_mask[rows],
            )  # fmt: skip
            tokens[:n], z[:n] = recomputed(self._serve, *inputs) if whole_blocks else self._serve(*inputs)
        v = torch.stack([self._detokenize(a) if keep else recomputed(self._detokenize, a) for a in tokens], dim=1)
        return (v, torch.stack(z, dim=1)) if return_latents else v

    def _start(self, batch: int, previous: Tensor | None) -> Tensor:
        """Where the latents of one level start, ``[B, M, E]``."""
        m, e = self.latents.shape
        if previous is not None:
            if self.self_conditioning is None:
                raise ValueError("latents: got a tensor, expected None for a model without self-conditioning")
            self._check("latents", previous, (batch, m, e))
        if self.self_conditioning is None:
            return self.latents.expand(batch, m, e)
        # Without any, one row of zeros serves all.
        previous = self.latents.new_zeros(1, 1, e) if previous is None else previous
        return self.self_conditioning(self.latents, previous).expand(batch, m, e)

    def _serve(
        self, block: RINBlock, tokens: list[Tensor], z: list[Tensor], c: Tensor, box: Sequence[Tensor],
        text: Tensor | None, text_mask: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
        """One block on the levels that it serves: fuses each with the block's inputs below it, folds them, unfolds."""
        fused = [
            tokens[k] if k == 0 else self._fuse(block, tokens[k], k, tuple(tokens[:k]), box[:k], box[k], None)
            for k in range(block.levels)
        ]
        x, latents = block(_fold(fused), _fold(z), c, text, text_mask)
        return x.chunk(block.levels), latents.chunk(block.levels)

    @overload
    def forward_level(
        self, x: Tensor, level: int, boxes: Tensor, t: Tensor, context: Context | None, labels: Tensor | None = None,
        text: Tensor | None = None, text_mask: Tensor | None = None, *, latents: Tensor | None = None,
        return_latents: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward_level(
        self, x: Tensor, level: int, boxes: Tensor, t: Tensor, context: Context | None, labels: Tensor | None = None,
        text: Tensor | None = None, text_mask: Tensor | None = None, *, latents: Tensor | None = None,
        return_latents: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    def forward_level(
        self,
        x: Tensor,
        level: int,
        boxes: Tensor,
        t: Tensor,
        context: Context | None,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        return_latents: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicts v for patches of one level whose lower levels are finished (paper section 4.4).

        Args:
            x: noised patches ``[B, C, f, h, w]`` of level ``level``.
            level: pyramid level.
            boxes: ``[B, 6]``.
            t: diffusion times ``[B]``.
            context: what the levels below give; ``None`` on level 0 alone.
            labels, text, text_mask: as in :meth:`forward`.
            latents, return_latents: as in :meth:`forward`, of this level alone: ``[B, M, E]``.

        Returns:
            v ``[B, C, f, h, w]``; with ``return_latents`` also the latents.

        Raises:
            ValueError: shapes that do not match the config, or a context missing where one is needed.
        """
        a, z, _ = self._run_level(
            x, level, boxes, t, context, labels, text, text_mask, latents, (), len(self.rin_blocks)
        )
        v = self._detokenize(a)
        return (v, z) if return_latents else v

    def level_features(
        self,
        x: Tensor,
        level: int,
        boxes: Tensor,
        t: Tensor,
        context: Context | None,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """What patches of a finished level give to the levels above as context (paper section 4.5, cached inference).

        Args: as of :meth:`forward_level`, for clean patches.

        Returns:
            ``{block: [B, N, D]}`` for each of ``fusing_blocks(level + 1)``: its inputs, projected by its fusion once
            for all patches that will sample them. The last of these blocks does not run.

        Raises:
            ValueError: as :meth:`forward_level`.
        """
        wanted = self.fusing_blocks(level + 1)
        if not wanted:
            return {}
        return self._run_level(x, level, boxes, t, context, labels, text, text_mask, None, wanted, wanted[-1])[2]

    def _run_level(
        self, x: Tensor, level: int, boxes: Tensor, t: Tensor, context: Context | None, labels: Tensor | None,
        text: Tensor | None, text_mask: Tensor | None, latents: Tensor | None, wanted: Sequence[int], stop: int,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:  # fmt: skip
        """The blocks before ``stop``: tokens, latents, and the projected inputs of the ``wanted`` blocks."""
        cfg = self.config
        batch = x.shape[0]
        self._check("x", x, (batch, cfg.channels, *cfg.patch))
        self._check("boxes", boxes, (batch, 6))
        if (context is None) != (level == 0):
            raise ValueError(f"context: got {type(context).__name__} on level {level}, expected None on level 0 alone")
        text, text_mask, pooled = self._conditioning(labels, text, text_mask, batch)
        c = self.conditioner(t, torch.full((batch,), level, device=x.device), labels, pooled)
        if cfg.fusion == "shallow":
            if context is None:
                below = torch.zeros_like(x)
            elif context.pixels is None:
                raise ValueError("context.pixels: got None, expected the previous level's patches (shallow fusion)")
            else:
                row = context.index[:, -1]
                below = self._upsample(context.pixels[row], boxes, context.boxes[-1][row])
            x = torch.cat((x, below), dim=1)
        a = self._tokenize(x)
        z = self._start(batch, latents)
        features: dict[int, Tensor] = {}
        for b, block in enumerate(self.rin_blocks):
            if b in wanted and block.fusion is not None:
                features[b] = block.fusion.project(a)
            if b == stop:
                break
            if block.levels <= level:
                continue
            if context is not None:
                a = self._fuse(block, a, level, context.features.get(b, ()), context.boxes, boxes, context.index)
            a, z = block(a, z, c, text, text_mask)
        return a, z, features

    def fusing_blocks(self, level: int) -> tuple[int, ...]:
        """The blocks that fuse context into ``level``: those whose inputs the levels below must keep."""
        return tuple(
            b for b, block in enumerate(self.rin_blocks) if block.fusion is not None and block.levels > level > 0
        )

    def _fuse(
        self, block: RINBlock, a: Tensor, level: int, sources: tuple[Tensor, ...], source_boxes: Sequence[Tensor],
        box: Tensor, index: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``a`` with its context; sources that samples share by ``index`` are projected already."""
        if block.fusion is None:
            return a
        cfg = self.config
        if cfg.detach_context:
            sources = tuple(s.detach() for s in sources)
        # Scales are the pyramid's, so the footprints are known without looking at the boxes.
        footprints = [
            tuple(footprint_size(float(q) ** (k - level), n, n) for q, n in zip(cfg.ratio, cfg.grid))
            for k in range(level)
        ]
        return block.fusion(
            a, sources, source_boxes, box, [cfg.grid] * level, cfg.grid, index, footprints, projected=index is not None
        )

    def _upsample(self, pixels: Tensor, box: Tensor, parent: Tensor) -> Tensor:
        """What the previous level's patch ``[B, C, f, h, w]`` shows inside ``box``, at the patch's resolution."""
        inside = relative_box(box, parent)
        # Relative offsets carry the rounding of two fp32 subtractions; the edge of the patch is the edge of the box.
        inside = torch.cat((inside[:, :3].clamp(min=0).minimum(1 - inside[:, 3:]), inside[:, 3:]), dim=1)
        return sample_patches(pixels, inside, self.config.patch, backend=self.kernels)

    def _tokenize(self, patch: Tensor) -> Tensor:
        pf, ph, pw = self.config.tokenizer
        pixels = rearrange(patch, "b c (f pf) (h ph) (w pw) -> b f h w (c pf ph pw)", pf=pf, ph=ph, pw=pw)
        position = self.position_f + self.position_h + self.position_w
        return (self.tokenizer_norm(self.tokenizer(pixels)) + position).flatten(1, 3)

    def _detokenize(self, a: Tensor) -> Tensor:
        (f, h, w), (pf, ph, pw) = self.config.grid, self.config.tokenizer
        return rearrange(
            self.detokenizer(self.out_norm(a)), "b (f h w) (c pf ph pw) -> b c (f pf) (h ph) (w pw)",
            f=f, h=h, w=w, pf=pf, ph=ph, pw=pw,
        )  # fmt: skip

    def _conditioning(
        self, labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None, batch: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Text tokens ``[B, S, D]``, which of them may be read, and their mean ``[B, c]``; checks labels too."""
        kind = self.config.conditioning
        for name, given, wanted in (("labels", labels, "class"), ("text", text, "text")):
            if given is not None and kind != wanted:
                raise ValueError(f"{name}: got a tensor, expected None for conditioning={kind!r}")
        if labels is not None:
            self._check("labels", labels, (batch,))
        if text is not None:
            self._check("text", text, (batch, max(1, text.shape[1]) if text.ndim > 1 else 1, self.config.text_width))
        if text_mask is not None:
            if text is None:
                raise ValueError("text_mask: got a tensor, expected None where text is None")
            self._check("text_mask", text_mask, tuple(text.shape[:2]))
            if text_mask.dtype is not torch.bool:
                raise TypeError(f"text_mask: got dtype {text_mask.dtype}, expected torch.bool")
        if kind != "text":
            return None, None, None
        text, text_mask = self.conditioner.embed_text(text, text_mask, batch)
        return text, text_mask, self.conditioner.pool_text(text, text_mask)

    @staticmethod
    def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {shape}")
