"""The network on tiles of several videos: rows of a batch, input scale, guidance, self-conditioning."""

from __future__ import annotations

import torch
from torch import Tensor

from hpdm.patch.config import HPDMConfig
from hpdm.patch.context import Context
from hpdm.patch.model import HPDM
from hpdm.process import denoise, network_input
from hpdm.sampling import SamplerOptions

NetworkInputs = tuple[Tensor, int, Tensor, Tensor, Context | None, Tensor | None, Tensor | None, Tensor | None]
"""Arguments of :meth:`hpdm.patch.model.HPDM.forward_level`: x, level, boxes, t, context, labels, text, text_mask."""


def guidance_copies(options: SamplerOptions) -> int:
    """Rows per tile in a network call: 2 with classifier-free guidance (with and without condition), else 1."""
    return 1 if options.guidance == 1.0 else 2


def tiles_per_call(options: SamplerOptions, videos: int) -> int:
    """Tiles of each video in one network call, at least one."""
    return max(1, options.tile_batch // max(1, videos * guidance_copies(options)))


def expand_rows(x: Tensor, copies: int, videos: int, tiles: int) -> Tensor:
    """Rows of a network call, ordered (guidance copy, video, tile), the tile fastest.

    Args:
        x: ``[copies, videos, tiles, ...]``, where any of the three sizes may be 1 for what does not depend on it.
        copies, videos, tiles: the sizes.

    Returns:
        ``[copies * videos * tiles, ...]``, contiguous.
    """
    return x.expand(copies, videos, tiles, *x.shape[3:]).flatten(0, 2).contiguous()


class VideoConditions:
    """Labels or texts of B videos; with guidance, also an unconditional copy of each video.

    Args:
        config: of the model.
        options: give the guidance weight.
        videos: number of videos B.
        labels: ``[B]`` int64, or ``None``.
        text: ``[B, S, text_width]``, or ``None``.
        text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
        device: where the model is.

    Raises:
        ValueError: no videos, labels out of range, not one text per video, or guidance without conditioning.
    """

    def __init__(
        self, config: HPDMConfig, options: SamplerOptions, videos: int, labels: Tensor | None, text: Tensor | None,
        text_mask: Tensor | None, device: torch.device,
    ) -> None:  # fmt: skip
        if videos == 0:
            raise ValueError("seeds: got none, expected at least one")
        self.videos, self.copies = videos, guidance_copies(options)
        if self.copies == 2 and labels is None and text is None:
            raise ValueError(f"guidance: got {options.guidance} without labels or text, expected 1")
        self.labels = self.text = self.text_mask = None
        if labels is not None:
            if tuple(labels.shape) != (videos,) or labels.min() < 0 or labels.max() > config.classes:
                raise ValueError(f"labels: got {labels.tolist()}, expected {videos} in 0..{config.classes - 1}")
            labels = labels.to(device)
            self.labels = self._with_copy(labels, torch.full_like(labels, config.classes))  # [copies, B]
        if text is not None:
            if text.shape[:1] != (videos,):
                raise ValueError(f"text: got shape {tuple(text.shape)}, expected {videos} texts, one for each seed")
            mask = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
            text, mask = text.to(device), mask.to(device)
            self.text = self._with_copy(text, text)  # [copies, B, S, text_width]
            self.text_mask = self._with_copy(mask, torch.zeros_like(mask))  # [copies, B, S]

    @property
    def rows(self) -> int:
        """Videos with their guidance copies, V."""
        return self.copies * self.videos

    def of_tiles(self, tiles: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Labels, texts and masks for a network call with ``tiles`` tiles of each video, one row per tile."""
        labels, text, mask = (
            None if x is None else expand_rows(x[:, :, None], self.copies, self.videos, tiles)
            for x in (self.labels, self.text, self.text_mask)
        )
        return labels, text, mask

    def _with_copy(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return torch.stack((conditional, unconditional)[: self.copies])


class TileNetwork:
    """Calls the network on tiles of B videos. ``V = copies * B`` counts the guidance copies of the videos.

    With self-conditioning it passes the latents of each call on level 0 to the next one. Later levels start
    without latents, as some training samples do: keeping them would cost memory proportional to the number of tiles.
    """

    def __init__(self, model: HPDM, options: SamplerOptions, conditions: VideoConditions) -> None:
        self.model, self.config, self.options, self.conditions = model, model.config, options, conditions
        self.device = model.latents.device
        self._latents: Tensor | None = None  # [V, M, E]

    def denoise(self, level: int, tiles: Tensor, boxes: Tensor, t: float, context: Context | None) -> Tensor:
        """Predicts the scaled clean tiles y^ of noised ones, with guidance: ``[B, n, C, f, h, w]`` both.

        Args:
            level: pyramid level.
            tiles: ``x~`` of :mod:`hpdm.process`.
            boxes: ``[n, 6]``.
            t: diffusion time.
            context: of the ``V * n`` rows; ``None`` on level 0.
        """
        v = self._guide(self._predict(level, self._inputs(level, tiles, boxes, t, context)))  # [B * n, C, f, h, w]
        y = denoise(tiles.flatten(0, 1), v, torch.full((1,), t, device=self.device))
        if self.options.clip:
            bound = self.config.signal_scale(level)
            y = y.clamp_(-bound, bound)
        return y.unflatten(0, tiles.shape[:2])

    def features(self, level: int, tiles: Tensor, boxes: Tensor, context: Context | None) -> dict[int, Tensor]:
        """Features of scaled clean tiles ``[B, n, C, f, h, w]`` for the levels above, per block ``[V, n, N, D]``."""
        features = self.model.level_features(*self._inputs(level, tiles, boxes, 0.0, context))
        return {block: feature.unflatten(0, (self.conditions.rows, -1)) for block, feature in features.items()}

    def scale_input(self, level: int, tiles: Tensor, t: float) -> Tensor:
        """Tiles ``[B, n, C, f, h, w]`` of unit variance; see :func:`hpdm.process.network_input`."""
        time = torch.full((1,), t, device=self.device)
        signal = torch.full((1,), self.config.signal_scale(level), device=self.device)
        return network_input(tiles.flatten(0, 1), time, signal).unflatten(0, tiles.shape[:2])

    def rows(self, x: Tensor, tiles: int) -> Tensor:
        """:func:`expand_rows` for these videos."""
        return expand_rows(x, self.conditions.copies, self.conditions.videos, tiles)

    def _inputs(self, level: int, tiles: Tensor, boxes: Tensor, t: float, context: Context | None) -> NetworkInputs:
        """The network's arguments, ``R = V * n`` rows."""
        n = tiles.shape[1]
        return (
            self.rows(self.scale_input(level, tiles, t)[None], n),  # [R, C, f, h, w]
            level,
            self.rows(boxes.to(self.device)[None, None], n),  # [R, 6]
            self.rows(torch.full((1, 1, 1), t, device=self.device), n),  # [R]
            context,
            *self.conditions.of_tiles(n),
        )

    def _predict(self, level: int, inputs: NetworkInputs) -> Tensor:
        """V ``[R, C, f, h, w]``."""
        if level > 0 or not self.config.self_conditioning:
            return self.model.forward_level(*inputs)
        v, self._latents = self.model.forward_level_with_latents(*inputs, self._latents)
        return v

    def _guide(self, v: Tensor) -> Tensor:
        """Classifier-free guidance: ``[V * n, ...] -> [B * n, ...]``."""
        if self.conditions.copies == 1:
            return v
        conditional, unconditional = v.chunk(2)
        return torch.lerp(unconditional, conditional, self.options.guidance)
