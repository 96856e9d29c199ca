"""The network: tokenizer, RIN blocks with deep context fusion and adaptive computation, detokenizer (paper Fig. 2).

The same blocks are called in two ways. Training: :meth:`HPDM.forward` takes one patch of every level. Sampling:
:meth:`HPDM.forward_level` takes patches of one level and the context of the finished levels below it, which
:meth:`HPDM.level_features` computes.

Sizes: batch B, levels L, tokens per patch N of width D, latents M of width E, conditioning width c.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from hpdm.checks import check_choice, check_shape
from hpdm.frames import FrameCopies, FrameTimes
from hpdm.patch.conditioner import Conditioner, Conditioning
from hpdm.patch.config import HPDMConfig
from hpdm.patch.context import Context
from hpdm.patch.positions import axis_sinusoids
from hpdm.patch.rin import Modulation, RINBlock, SelfConditioning
from hpdm.recompute import Recompute, recomputed
from hpdm_kernels import footprint_size, sample_patches
from hpdm_kernels.boxes import relative_box
from hpdm_kernels.modules import check_backend


class Told(NamedTuple):
    """What the network is told of a level besides its patches and their conditioning."""

    t: Tensor
    """``[B]``."""
    frame_t: Tensor | None
    """``[B, F]``."""
    sparse: Tensor | None
    """Bool ``[B]``; on level 0."""
    memory: Tensor | None
    """``[B, M, E]``; on level 0."""


class HPDM(nn.Module):
    """Hierarchical Patch Diffusion Model (CVPR 2024).

    Args:
        config: sizes, pyramid and ablation switches; see :mod:`hpdm.patch.presets`.
        kernels: backend of every op, ``"auto" | "reference" | "torch" | "triton"``. It changes neither the parameters
            nor the ``state_dict``, and the results only by rounding.
        recompute: what the backward pass computes again instead of keeping it, ``"none" | "selective" | "block"``, see
            :data:`hpdm.recompute.Recompute`. It trades time for memory; the results change only by rounding.

    Raises:
        ValueError: unknown backend or recompute setting.
    """

    def __init__(self, config: HPDMConfig, kernels: str = "auto", recompute: str = "none") -> None:
        super().__init__()
        self.config = config
        self.kernels = check_backend(kernels)
        self.recompute: Recompute = check_choice("recompute", recompute, Recompute)
        f, h, w = config.grid
        channels = config.channels * (2 if config.fusion == "shallow" else 1)
        self.tokenizer = nn.Linear(channels * math.prod(config.tokenizer), config.width)
        self.tokenizer_norm = nn.LayerNorm(config.width)
        # Positions inside the patch, one table per axis. The position of the patch is an input of the fusion.
        self.position_f = nn.Parameter(torch.empty(f, 1, 1, config.width))
        self.position_h = nn.Parameter(torch.empty(1, h, 1, config.width))
        self.position_w = nn.Parameter(torch.empty(1, 1, w, config.width))
        self.latents = nn.Parameter(torch.empty(config.latents, config.latent_width))
        self.self_conditioning = SelfConditioning(config, kernels) if config.self_conditioning else None
        self.conditioner = Conditioner(config)
        self.blocks = nn.ModuleList()
        for n in config.levels_per_block:
            first = self.rin_blocks[0] if config.share_blocks and len(self.blocks) else None
            self.blocks.append(RINBlock(config, n, kernels, self.recompute, first))
        self.out_norm = nn.LayerNorm(config.width)
        self.detokenizer = nn.Linear(config.width, config.channels * math.prod(config.tokenizer))
        pixels = config.channels * math.prod(config.tokenizer)
        self.frame_times = FrameTimes(config.width, pixels) if config.known_frames else None
        self.frame_copies = FrameCopies(config.width, pixels) if config.known_frames else None
        # Added to the tokens of level 0 where its frames are far apart.
        self.sparse = nn.Parameter(torch.zeros(config.width)) if config.spacing > 1 else None
        self.memory = SelfConditioning(config, kernels) if config.memory else None
        self.initialize()

    def initialize(self) -> None:
        """Draws the initial weights: Xavier for linear layers, zeros for modulations and the detokenizer (adaLN-Zero).

        A new model predicts v = 0.
        """
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
        for added in (self.frame_times, self.frame_copies):
            if added is not None:
                added.initialize()
        nn.init.normal_(self.latents, std=0.02)
        width = self.config.width
        with torch.no_grad():
            for axis, table in enumerate((self.position_f, self.position_h, self.position_w)):
                table.copy_(axis_sinusoids(table.numel() // width, width, axis).reshape(table.shape))

    @property
    def rin_blocks(self) -> list[RINBlock]:
        """The blocks, typed (``nn.ModuleList`` is not)."""
        return cast(list[RINBlock], list(self.blocks))

    def sharded_modules(self) -> list[tuple[nn.Module, bool]]:
        """The modules that FSDP shards on their own, in the order in which they must be wrapped.

        The flag says whether to reshard a module's weights after its forward. A process then holds the whole weights of
        one block at a time. A block's fusion is wrapped on its own, because it is called before the block, and not
        resharded, because it is called once per level; neither are the last block, whose backward pass comes next, and
        a block that is called in place of all others.
        """
        modules: list[tuple[nn.Module, bool]] = []
        for block in self.rin_blocks:
            if block.fusion is not None:
                modules.append((block.fusion, False))
            if self.config.share_blocks and block is not self.rin_blocks[0]:
                continue  # no weights but the fusion's
            modules.append((block, not self.config.share_blocks and block is not self.rin_blocks[-1]))
        return modules

    def compiled_modules(self) -> list[nn.Module]:
        """The modules to compile one by one where the whole network cannot be, as with FSDP."""
        return list(self.blocks[:1] if self.config.share_blocks else self.blocks)

    def forward(
        self, x: Tensor, boxes: Tensor, t: Tensor, labels: Tensor | None = None, text: Tensor | None = None,
        text_mask: Tensor | None = None, *, latents: Tensor | None = None, frame_t: Tensor | None = None,
        sparse: Tensor | None = None, memory: Tensor | None = None, return_latents: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Predicts v for one patch of every level, jointly (paper eq. 4).

        It also takes the lowest levels alone, L then being their number: no level depends on those above it.

        Args:
            x: noised patches ``[B, L, C, f, h, w]``, scaled by :func:`hpdm.process.network_input`.
            boxes: ``[B, L, 6]`` float32, nested.
            t: diffusion times ``[B, L]`` in [0, 1].
            labels: ``[B]`` int64 class labels, ``config.classes`` for none; ``None`` for no class in the whole batch.
            text: embeddings ``[B, S, text_width]``, see :mod:`hpdm.text`; ``None`` for no text in the batch.
            text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere. A sample without text has a row
                of false. Neither the padding's values nor its length change the result (up to rounding).
            latents: for a model with self-conditioning, ``[B, L, M, E]`` from an earlier pass over the same patches;
                ``None``, or zeros for a sample, for no earlier pass. No gradient flows into them.
            frame_t: for a model with known frames, diffusion times of each frame of tokens ``[B, L, F]``, for which
                ``x`` is noised and scaled; ``None``: those of ``t``.
            sparse: for a model with a sparse storyline, the samples whose frames of level 0 are far apart, bool
                ``[B]``; ``None``: none.
            memory: for a model with memory, the final latents of level 0 of the window before, ``[B, M, E]``; ``None``,
                or zeros for a sample, for none. No gradient flows into them.
            return_latents: also return the final latents of this pass, ``[B, L, M, E]``.

        Returns:
            v ``[B, L, C, f, h, w]``, or with ``return_latents`` a pair.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: shapes that do not match the config, or conditioning of another kind than the config's.
        """
        cfg, batch = self.config, x.shape[0]
        levels = min(max(x.shape[1], 1), cfg.levels) if x.ndim > 1 else cfg.levels
        check_shape("x", x, (batch, levels, cfg.channels, *cfg.patch))
        check_shape("boxes", boxes, (batch, levels, 6))
        check_shape("t", t, (batch, levels))
        # Rows are level-major from here on, so that the rows of levels 0 .. n-1 are a slice.
        conditioning = self.conditioner(
            t.transpose(0, 1), torch.arange(levels, device=x.device), labels, text, text_mask
        )  # L * B rows
        level_boxes = boxes.unbind(1)  # L x [B, 6]
        patches = self._fuse_pixels(x.unbind(1), level_boxes)  # L x [B, C or 2C, f, h, w]
        tokens = [self._maybe_recomputed(self._tokenize, patch) for patch in patches]  # L x [B, N, D]
        if frame_t is not None:
            check_shape("frame_t", frame_t, (batch, levels, cfg.grid[0]))
            tokens = [self._tell_frames(a, t[:, k], frame_t[:, k], x[:, k]) for k, a in enumerate(tokens)]
        tokens[0] = self._tell_sparse(tokens[0], sparse)
        z = [
            self._initial_latents(batch, None if latents is None else latents[:, k]) for k in range(levels)
        ]  # L x [B, M, E]
        z[0] = self._remember(z[0], memory)
        for block in self.rin_blocks:
            n = min(block.levels, levels)
            tokens[:n], z[:n] = self._run_block(
                block, tokens[:n], z[:n], level_boxes[:n], *conditioning.first(n * batch)
            )  # n x [B, N, D], n x [B, M, E]
        frame_times = [None] * levels if frame_t is None else frame_t.unbind(1)  # L x [B, F]
        predicted = [
            self._maybe_recomputed(partial(self._predict, x=x[:, k], level=k, t=t[:, k], frame_t=frame_times[k]), a)
            for k, a in enumerate(tokens)
        ]
        v = torch.stack(predicted, dim=1)  # [B, L, C, f, h, w]
        return (v, torch.stack(z, dim=1)) if return_latents else v

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
        frame_t: Tensor | None = None,
        sparse: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Predicts v for patches of one level whose lower levels are finished (paper section 4.4).

        Args:
            x: noised patches ``[B, C, f, h, w]`` of level ``level``, scaled by :func:`hpdm.process.network_input`.
            level: pyramid level.
            boxes: ``[B, 6]``.
            t: diffusion times ``[B]``.
            context: from the finished levels; ``None`` on level 0 and only there.
            labels, text, text_mask: as in :meth:`forward`.
            frame_t: as in :meth:`forward`, ``[B, F]``.
            sparse, memory: as in :meth:`forward`, on level 0.

        Returns:
            v ``[B, C, f, h, w]``.

        Raises:
            TypeError, ValueError: as :meth:`forward`, or a context missing where one is needed.
        """
        conditioning = self._condition_level(x, level, t, labels, text, text_mask)
        told = Told(t, frame_t, sparse, memory)
        tokens, _, _ = self._run_level(x, level, boxes, conditioning, context, told=told)
        return self._predict(tokens, x, level, t, frame_t)

    def forward_level_with_latents(
        self,
        x: Tensor,
        level: int,
        boxes: Tensor,
        t: Tensor,
        context: Context | None,
        labels: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        frame_t: Tensor | None = None,
        sparse: Tensor | None = None,
        memory: Tensor | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward_level` with self-conditioning: also takes the latents of an earlier pass, and returns its own.

        Args: as of :meth:`forward_level`, and ``latents [B, M, E]``, ``None`` for no earlier pass.

        Returns:
            v ``[B, C, f, h, w]`` and latents ``[B, M, E]``.

        Raises:
            TypeError, ValueError: as :meth:`forward_level`.
        """
        conditioning = self._condition_level(x, level, t, labels, text, text_mask)
        told = Told(t, frame_t, sparse, memory)
        tokens, z, _ = self._run_level(x, level, boxes, conditioning, context, latents, told=told)
        return self._predict(tokens, x, level, t, frame_t), z

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
        """The features of a finished level's patches that the levels above fuse (section 4.5, "Cached inference").

        Args: as of :meth:`forward_level`, for clean patches.

        Returns:
            ``{block: [B, N, D]}`` for each of ``fusing_blocks(level + 1)``: the block's inputs, already projected by
            its fusion, so that this is done once for all patches that sample them. The last of these blocks and those
            after it do not run: nothing needs their outputs.

        Raises:
            TypeError, ValueError: as :meth:`forward_level`.
        """
        blocks = self.fusing_blocks(level + 1)
        if not blocks:
            return {}
        conditioning = self._condition_level(x, level, t, labels, text, text_mask)
        return self._run_level(x, level, boxes, conditioning, context, None, blocks, blocks[-1])[2]

    def fusing_blocks(self, level: int) -> tuple[int, ...]:
        """The blocks that fuse context into ``level``, and so need their inputs on the levels below."""
        return tuple(
            b for b, block in enumerate(self.rin_blocks) if block.fusion is not None and block.levels > level > 0
        )

    def _run_block(
        self, block: RINBlock, tokens: list[Tensor], z: list[Tensor], boxes: Sequence[Tensor],
        c: Tensor, text: Tensor | None, text_mask: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
        """Fuses context into levels 1 .. n-1, runs the block on all n levels as one batch, and splits them again.

        ``tokens`` are n tensors ``[B, N, D]``, ``z`` n tensors ``[B, M, E]``, and so are the results.
        """
        fused = [
            self._fuse(block, tokens[k], k, tuple(tokens[:k]), boxes[:k], boxes[k], None) if k else tokens[0]
            for k in range(len(tokens))
        ]  # n x [B, N, D]
        x, latents = block(_cat(fused), _cat(z), c, text, text_mask)  # [n * B, N, D], [n * B, M, E]
        return x.chunk(len(tokens)), latents.chunk(len(tokens))

    def _condition_level(
        self, x: Tensor, level: int, t: Tensor, labels: Tensor | None, text: Tensor | None, text_mask: Tensor | None
    ) -> Conditioning:
        """Conditioning of the B patches ``x`` of one level."""
        check_shape("t", t, (x.shape[0],))
        return self.conditioner(t[None], torch.full((1,), level, device=t.device), labels, text, text_mask)

    def _run_level(
        self, x: Tensor, level: int, boxes: Tensor, conditioning: Conditioning, context: Context | None,
        latents: Tensor | None = None, feature_blocks: Sequence[int] = (), stop: int | None = None,
        told: Told | None = None,
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:  # fmt: skip
        """Runs one level through the blocks before ``stop`` (all of them for ``None``).

        Returns:
            Tokens ``[B, N, D]``, latents ``[B, M, E]``, and the projected inputs ``[B, N, D]`` of ``feature_blocks``.
        """
        batch = x.shape[0]
        check_shape("x", x, (batch, self.config.channels, *self.config.patch))
        check_shape("boxes", boxes, (batch, 6))
        if (context is None) != (level == 0):
            raise ValueError(f"context: got {type(context).__name__} on level {level}, expected None on level 0 alone")
        a = self._tokenize(self._fuse_pixels_of_context(x, boxes, context))  # [B, N, D]
        z = self._initial_latents(batch, latents)  # [B, M, E]
        if told is not None and told.frame_t is not None:
            check_shape("frame_t", told.frame_t, (batch, self.config.grid[0]))
            a = self._tell_frames(a, told.t, told.frame_t, x)
        if level == 0:
            a = self._tell_sparse(a, None if told is None else told.sparse)
            z = self._remember(z, None if told is None else told.memory)
        features: dict[int, Tensor] = {}
        for b, block in enumerate(self.rin_blocks):
            if b in feature_blocks and block.fusion is not None:
                features[b] = block.fusion.project(a)
            if b == stop:
                break
            if block.levels <= level:
                continue
            if context is not None:
                sources = context.features.get(b, ())
                a = self._fuse(block, a, level, sources, context.boxes, boxes, context.index)  # [B, N, D]
            a, z = block(a, z, *conditioning)  # [B, N, D], [B, M, E]
        return a, z, features

    def _fuse(
        self, block: RINBlock, a: Tensor, level: int, sources: tuple[Tensor, ...], source_boxes: Sequence[Tensor],
        box: Tensor, index: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Deep context fusion (section 4.2): tokens ``a [B, N, D]`` of a level with those of the levels below.

        Without ``index`` the sources are ``level`` tensors ``[B, N, D]``. With it they are ``[T_k, N, D]``, already
        projected, and ``index [B, level]`` says which rows serve a sample.
        """
        if block.fusion is None:
            return a
        cfg = self.config
        if cfg.detach_context:
            sources = tuple(s.detach() for s in sources)
        # The pyramid fixes the scales of boxes, so the sizes of footprints follow from the config.
        footprints = [
            tuple(footprint_size(float(q) ** (k - level), n, n) for q, n in zip(cfg.ratio, cfg.grid))
            for k in range(level)
        ]
        return block.fusion(
            a, sources, source_boxes, box, [cfg.grid] * level, cfg.grid, index, footprints, projected=index is not None
        )

    def _fuse_pixels(self, patches: Sequence[Tensor], boxes: Sequence[Tensor]) -> Sequence[Tensor]:
        """Shallow fusion (Table 3): concatenates each level's patch with the previous level's, resampled to its box.

        L tensors ``[B, C, f, h, w]`` -> L tensors ``[B, 2C, f, h, w]``, with zeros on level 0. With deep fusion the
        patches are returned unchanged.
        """
        if self.config.fusion != "shallow":
            return patches
        below = [p.detach() if self.config.detach_context else p for p in patches[:-1]]
        upsampled = [torch.zeros_like(patches[0])]
        upsampled += [self._upsample(p, box, parent) for p, box, parent in zip(below, boxes[1:], boxes)]
        return [torch.cat(pair, dim=1) for pair in zip(patches, upsampled)]

    def _fuse_pixels_of_context(self, x: Tensor, boxes: Tensor, context: Context | None) -> Tensor:
        """:meth:`_fuse_pixels` for one level ``[B, C, f, h, w]`` whose previous level is finished."""
        if self.config.fusion != "shallow":
            return x
        if context is None:
            return torch.cat((x, torch.zeros_like(x)), dim=1)
        if context.pixels is None:
            raise ValueError("context.pixels: got None, expected the previous level's patches (shallow fusion)")
        row = context.index[:, -1]  # [B]
        below = self._upsample(context.pixels[row], boxes, context.boxes[-1][row])  # [B, C, f, h, w]
        return torch.cat((x, below), dim=1)  # [B, 2C, f, h, w]

    def _upsample(self, pixels: Tensor, box: Tensor, parent: Tensor) -> Tensor:
        """The part of patches ``[B, C, f, h, w]`` with boxes ``parent`` inside ``box``, at the size of a patch."""
        inside = relative_box(box, parent)  # [B, 6]
        # Two fp32 subtractions round the relative offsets: clamp them, so that the box stays inside its parent.
        inside = torch.cat((inside[:, :3].clamp(min=0).minimum(1 - inside[:, 3:]), inside[:, 3:]), dim=1)
        return sample_patches(pixels, inside, self.config.patch, backend=self.kernels)

    def _tokenize(self, patch: Tensor) -> Tensor:
        """Patches ``[B, C, f, h, w]`` -> tokens with positions ``[B, N, D]``."""
        pixels = self._pixels_of_tokens(patch)  # [B, F, H, W, C * pf * ph * pw]
        position = self.position_f + self.position_h + self.position_w  # [F, H, W, D]
        return (self.tokenizer_norm(self.tokenizer(pixels)) + position).flatten(1, 3)  # [B, N, D]

    def _tell_frames(self, tokens: Tensor, t: Tensor, frame_t: Tensor, x: Tensor) -> Tensor:
        """Tells tokens ``[B, N, D]`` of patches ``x`` at times ``t [B]`` those of their frames, ``[B, F]``."""
        if self.frame_times is None:
            raise ValueError("frame_t: got a tensor, expected None for a model without known frames")
        told: Tensor = self.frame_times(tokens, t, frame_t, self._pixels_of_tokens(x).flatten(2, 3))
        return told

    def _pixels_of_tokens(self, patch: Tensor) -> Tensor:
        """Patches ``[B, C, f, h, w]`` -> what each token is made of, ``[B, F, H, W, C * pf * ph * pw]``."""
        pf, ph, pw = self.config.tokenizer
        return rearrange(patch, "b c (f pf) (h ph) (w pw) -> b f h w (c pf ph pw)", pf=pf, ph=ph, pw=pw)

    def _tell_sparse(self, tokens: Tensor, sparse: Tensor | None) -> Tensor:
        """Tells tokens ``[B, N, D]`` of level 0 which samples, bool ``[B]``, have frames that are far apart."""
        if sparse is None:
            return tokens
        if self.sparse is None:
            raise ValueError("sparse: got a tensor, expected None for a model without a sparse storyline")
        check_shape("sparse", sparse, tokens.shape[:1])
        return tokens + sparse[:, None, None] * self.sparse

    def _remember(self, z: Tensor, memory: Tensor | None) -> Tensor:
        """Initial latents ``[B, M, E]`` of level 0 from ``z`` and those of the window before."""
        if self.memory is None:
            if memory is not None:
                raise ValueError("memory: got a tensor, expected None for a model without memory")
            return z
        if memory is not None:
            check_shape("memory", memory, z.shape)
        # Zeros stand for no window before; one row of them is enough.
        started: Tensor = self.memory(z, z.new_zeros(1, 1, z.shape[2]) if memory is None else memory)
        return started

    def _predict(self, a: Tensor, x: Tensor, level: int, t: Tensor, frame_t: Tensor | None) -> Tensor:
        """The v of patches ``x [B, C, f, h, w]`` of one level, of their shape, from their last tokens ``[B, N, D]``."""
        (f, h, w), (pf, ph, pw) = self.config.grid, self.config.tokenizer
        a = self.out_norm(a)
        v = self.detokenizer(a)  # [B, N, C * pf * ph * pw]
        if frame_t is not None and self.frame_copies is not None:
            pixels = self._pixels_of_tokens(x).flatten(2, 3)  # [B, F, H * W, C * pf * ph * pw]
            scale = self.config.signal_scales[level]
            v, a = (part.unflatten(1, (f, -1)) for part in (v, a))
            v = self.frame_copies(v, a, pixels, t, frame_t, scale).flatten(1, 2)
        return rearrange(v, "b (f h w) (c pf ph pw) -> b c (f pf) (h ph) (w pw)", f=f, h=h, w=w, pf=pf, ph=ph, pw=pw)

    def _initial_latents(self, batch: int, previous: Tensor | None) -> Tensor:
        """Initial latents of one level ``[B, M, E]``; ``previous [B, M, E]`` are those of an earlier pass, if any."""
        m, e = self.latents.shape
        if previous is not None:
            if self.self_conditioning is None:
                raise ValueError("latents: got a tensor, expected None for a model without self-conditioning")
            check_shape("latents", previous, (batch, m, e))
        if self.self_conditioning is None:
            return self.latents.expand(batch, m, e)
        # Without an earlier pass all rows are the same, so one row of zeros is enough.
        previous = self.latents.new_zeros(1, 1, e) if previous is None else previous
        return self.self_conditioning(self.latents, previous).expand(batch, m, e)

    def _maybe_recomputed(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``fn(x)``, computed again in the backward pass if ``recompute`` is ``"block"``."""
        return recomputed(fn, x) if self.recompute == "block" else fn(x)


def _cat(levels: Sequence[Tensor]) -> Tensor:
    """Concatenates the n levels' ``[B, ...]`` to ``[n * B, ...]``, level-major; a single one is not copied."""
    return levels[0] if len(levels) == 1 else torch.cat(list(levels))
