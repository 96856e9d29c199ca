"""The network on tiles of several videos: rows of a batch, input scale, guidance, self-conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpdm.conditioning import check_subjects
from hpdm.frames import of_pixels
from hpdm.patch.config import HPDMConfig
from hpdm.patch.context import Context
from hpdm.patch.model import HPDM
from hpdm.process import denoise, network_input
from hpdm.sampling import SamplerOptions

NetworkInputs = tuple[Tensor, int, Tensor, Tensor, Context | None, Tensor | None, Tensor | None, Tensor | None]
"""Arguments of :meth:`hpdm.patch.model.HPDM.forward_level`: x, level, boxes, t, context, labels, text, text_mask."""


class KnownTiles(NamedTuple):
    """Known frames in n tiles of B videos."""

    tiles: Tensor
    """``x~ [B, n, C, f, h, w]`` with known frames at times of their own."""
    frame_t: Tensor
    """Times of the frames of tokens, ``[n, F]``, on the device of the network."""
    guidance: float = 0.0
    """Weight w of guidance by known frames, ``(1 + w) v - w v'``."""


def copies_of(weight: float) -> int:
    """Rows per tile in a network call: 2 with classifier-free guidance (with and without condition), else 1."""
    return 1 if weight == 1.0 else 2


def rows_of(weight: float, frame_guidance: float) -> int:
    """Rows per tile in a network call with known frames: one more with guidance by these."""
    return copies_of(weight) + (frame_guidance > 0)


def feature_copies(options: SamplerOptions) -> int:
    """Rows per tile of the features of finished levels: 2 if the levels above, the later ones, are guided, else 1."""
    return copies_of(options.level_guidance(1))


def tiles_per_call(options: SamplerOptions, videos: int, copies: int) -> int:
    """Tiles of each video in one network call, at least one: twice as many where there is no guidance."""
    return max(1, options.tile_batch // max(1, videos * copies))


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
    """Labels or texts of B videos; if any level is guided, also an unconditional copy of each video.

    Args:
        config: of the model.
        options: give the guidance weights.
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
        self.videos = videos
        weights = {"guidance": options.level_guidance(0)}
        if config.levels > 1 and options.later_guidance is not None:
            weights["later_guidance"] = options.later_guidance
        self.copies = max(copies_of(weight) for weight in weights.values())
        """2 if any level is guided, else 1."""
        check_subjects(config, videos, labels, text, weights)
        self.labels = self.text = self.text_mask = None
        if labels is not None:
            labels = labels.to(device)
            self.labels = self._with_copy(labels, torch.full_like(labels, config.classes))  # [copies, B]
        if text is not None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool) if text_mask is None else text_mask
            text, mask = text.to(device), mask.to(device)
            self.text = self._with_copy(text, text)  # [copies, B, S, text_width]
            self.text_mask = self._with_copy(mask, torch.zeros_like(mask))  # [copies, B, S]

    def of_tiles(self, tiles: int, copies: Sequence[int]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Labels, texts and masks for a network call with ``tiles`` tiles of each video, one row per tile and copy.

        ``copies`` says for each copy whether it is conditional (0) or not (1).
        """
        labels, text, mask = (
            None
            if x is None
            else expand_rows(torch.stack([x[c] for c in copies])[:, :, None], len(copies), self.videos, tiles)
            for x in (self.labels, self.text, self.text_mask)
        )
        return labels, text, mask

    def _with_copy(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return torch.stack((conditional, unconditional)[: self.copies])


class TileNetwork:
    """Calls the network on tiles of B videos. ``V = copies * B`` counts the guidance copies of the videos in a call.

    With self-conditioning it passes the latents of each call on level 0 to the next one. Later levels start
    without latents, as some training samples do: keeping them would cost memory proportional to the number of tiles.
    """

    def __init__(self, model: HPDM, options: SamplerOptions, conditions: VideoConditions) -> None:
        self.model, self.config, self.options, self.conditions = model, model.config, options, conditions
        self.device = model.latents.device
        self._latents: Tensor | None = None  # [V, M, E]
        self._memory: Tensor | None = None  # [copies, B, M, E]
        self.sparse = False
        """Whether the frames of level 0 are far apart."""

    def remember(self, before: Tensor) -> None:
        """Starts the latents of level 0 from those of the window before, ``[B, C, f, h, w]`` in [-1, 1].

        Its latents are computed again from its clean frames, as in training, with and without condition.
        """
        box = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
        copies = self.conditions.copies
        inputs = self._inputs(0, before[:, None] * self.config.signal_scale(0), box, 0.0, None, copies)
        _, latents = self.model.forward_level_with_latents(*inputs)
        self._memory = latents.unflatten(0, (copies, -1))

    def denoise(
        self, level: int, tiles: Tensor, boxes: Tensor, t: float, context: Context | None, guidance: float,
        known: KnownTiles | None = None,
    ) -> Tensor:  # fmt: skip
        """Predicts the scaled clean tiles y^ of noised ones, with guidance: ``[B, n, C, f, h, w]`` both.

        What it predicts of known frames means nothing. Of others whose times differ, in a rolling clip, it does.

        Args:
            level: pyramid level.
            tiles: ``x~`` of :mod:`hpdm.process`.
            boxes: ``[n, 6]``.
            t: diffusion time.
            context: of the ``V * n`` rows, ``V = copies_of(guidance) * B``; ``None`` on level 0.
            guidance: weight; at 1 there is no unconditional copy.
            known: the tiles with known frames; ``None`` for none.
        """
        if known is None:
            inputs = self._inputs(level, tiles, boxes, t, context, copies_of(guidance))
            v = _guide(self._predict(level, inputs), guidance)  # [B * n, C, f, h, w]
        else:
            v = self._denoise_knowing(level, tiles, boxes, t, context, guidance, known)
        time = torch.full((1,), t, dtype=torch.float32, device=self.device)
        if known is not None:
            time = of_pixels(known.frame_t, self.config.tokenizer[0]).repeat(len(tiles), 1, 1)  # [B * n, 1, f]
        y = denoise(tiles.flatten(0, 1), v, time)
        if self.options.clip:
            bound = self.config.signal_scale(level)
            y = y.clamp_(-bound, bound)
        return y.unflatten(0, tiles.shape[:2])

    def _denoise_knowing(
        self, level: int, tiles: Tensor, boxes: Tensor, t: float, context: Context | None, guidance: float,
        known: KnownTiles,
    ) -> Tensor:  # fmt: skip
        """V ``[B * n, C, f, h, w]``, with both kinds of guidance.

        The rows of a call are, in this order, those with condition and known frames, those without known frames and
        those without condition, as far as there are any.
        """
        n, time = tiles.shape[1], torch.full_like(known.frame_t, t)  # [n, F]
        unaware, unconditional = known.guidance > 0, copies_of(guidance) == 2
        shown = [self.scale_input(level, known.tiles, known.frame_t)]  # [B, n, C, f, h, w] each
        frame_t = [known.frame_t]
        if unaware:
            shown.append(self.scale_input(level, tiles, t))
            frame_t.append(time)
        if unconditional:
            shown.append(shown[0])
            frame_t.append(known.frame_t)
        copies = len(shown)
        inputs: NetworkInputs = (
            self.rows(torch.stack(shown), n, copies),
            level,
            self.rows(boxes.to(self.device)[None, None], n, copies),
            self.rows(torch.full((1, 1, 1), t, device=self.device), n, copies),
            context,
            *self.conditions.of_tiles(n, [0] * (copies - unconditional) + [1] * unconditional),
        )
        memory = None
        if self._memory is not None and level == 0:
            kinds = [self._memory[0], *[torch.zeros_like(self._memory[0])] * unaware]
            kinds += [self._memory[-1]] * unconditional
            memory = self.rows(torch.stack(kinds)[:, :, None], n, copies)
        v = self._predict(level, inputs, self.rows(torch.stack(frame_t)[:, None], n, copies), memory).chunk(copies)
        guided = torch.lerp(v[-1], v[0], guidance) if unconditional else v[0]
        return guided + known.guidance * (v[0] - v[1]) if unaware else guided

    def features(
        self, level: int, tiles: Tensor, boxes: Tensor, context: Context | None, copies: int
    ) -> dict[int, Tensor]:
        """Features for the levels above, per block ``[V, n, N, D]`` with ``V = copies * B``.

        ``tiles`` are scaled tiles of a finished level at the time ``options.context_noise``, ``[B, n, C, f, h, w]``.
        """
        inputs = self._inputs(level, tiles, boxes, self.options.context_noise, context, copies)
        features = self.model.level_features(*inputs)
        rows = copies * self.conditions.videos
        return {block: feature.unflatten(0, (rows, -1)) for block, feature in features.items()}

    def scale_input(self, level: int, tiles: Tensor, t: float | Tensor) -> Tensor:
        """Tiles ``[B, n, C, f, h, w]`` of unit variance; see :func:`hpdm.process.network_input`.

        ``t`` is one time, or those of the tiles' frames of tokens, ``[n, F]``.
        """
        if isinstance(t, Tensor):
            time = of_pixels(t, self.config.tokenizer[0])  # [n, 1, f]
            return network_input(
                tiles, time.expand(len(tiles), -1, -1, -1), torch.tensor(self.config.signal_scale(level))
            )
        time = torch.full((1,), t, dtype=torch.float32, device=self.device)
        signal = torch.full((1,), self.config.signal_scale(level), dtype=torch.float32, device=self.device)
        return network_input(tiles.flatten(0, 1), time, signal).unflatten(0, tiles.shape[:2])

    def rows(self, x: Tensor, tiles: int, copies: int) -> Tensor:
        """:func:`expand_rows` for these videos."""
        return expand_rows(x, copies, self.conditions.videos, tiles)

    def _inputs(
        self, level: int, tiles: Tensor, boxes: Tensor, t: float, context: Context | None, copies: int
    ) -> NetworkInputs:
        """The network's arguments, ``R = copies * B * n`` rows."""
        n = tiles.shape[1]
        return (
            self.rows(self.scale_input(level, tiles, t)[None], n, copies),  # [R, C, f, h, w]
            level,
            self.rows(boxes.to(self.device)[None, None], n, copies),  # [R, 6]
            self.rows(torch.full((1, 1, 1), t, device=self.device), n, copies),  # [R]
            context,
            *self.conditions.of_tiles(n, range(copies)),
        )

    def _predict(
        self, level: int, inputs: NetworkInputs, frame_t: Tensor | None = None, memory: Tensor | None = None
    ) -> Tensor:
        """V ``[R, C, f, h, w]``; ``frame_t [R, F]`` with known frames, ``memory [R, M, E]`` with memory."""
        told: dict[str, Any] = {} if frame_t is None else {"frame_t": frame_t}
        if memory is not None:
            told["memory"] = memory
        if self.sparse and level == 0:
            told["sparse"] = torch.ones(len(inputs[0]), dtype=torch.bool, device=self.device)
        if level > 0 or not self.config.self_conditioning:
            return self.model.forward_level(*inputs, **told)
        latents = self._latents_of(len(inputs[0]))
        v, self._latents = self.model.forward_level_with_latents(*inputs, latents=latents, **told)
        return v

    def _latents_of(self, rows: int) -> Tensor | None:
        """The latents of the last call for a call with ``rows`` rows; zeros, which stand for none, for rows it lacked.

        The conditional rows come first. The unconditional ones are there or not where guidance begins or ends.
        """
        last = self._latents
        if last is None or len(last) == rows:
            return last
        return last[:rows] if len(last) > rows else torch.cat((last, last.new_zeros(rows - len(last), *last.shape[1:])))


def _guide(v: Tensor, weight: float) -> Tensor:
    """Classifier-free guidance: ``[V * n, ...] -> [B * n, ...]``."""
    if copies_of(weight) == 1:
        return v
    conditional, unconditional = v.chunk(2)
    return torch.lerp(unconditional, conditional, weight)
