"""What is random in the loss of a micro-batch, drawn on the CPU before the device computes the loss.

So every device sees the same numbers, and the computation itself reads nothing from the host: it can be captured in a
CUDA graph, and the numbers of the next step can be drawn while the device is busy with this one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hpdm.frames import draw_frames
from hpdm.objective import Objective, draw_mirrored, draw_noise, draw_times, loss_weight
from hpdm.patch.boxes import sample_boxes
from hpdm.patch.config import HPDMConfig
from hpdm.training.stills import draw_stills


class Draws(NamedTuple):
    """What is drawn for B clips and the lowest n levels of the pyramid, which are all unless levels are cut."""

    boxes: Tensor
    """Boxes of the patches, float32 ``[B, n, 6]``."""
    t: Tensor
    """Diffusion times, float32 ``[B, n]``."""
    noise: Tensor
    """Standard normal, float32 ``[B, n, C, f, h, w]``."""
    weight: Tensor
    """Weights of the squared errors, float32 ``[B, n]``: 0 where a level is shown finished, and so not trained. The
    others are so much larger, and those of levels that are cut from other micro-batches, that the expectation stays."""
    signal: Tensor
    """Scales b of the clean signal, float32 ``[n]``; not random, but it goes the same way to the device."""
    dropped: Tensor
    """Clips without their label or text, bool ``[B]``."""
    stills: Tensor | None = None
    """For each frame the number of the frame that it shows, int64 ``[B, F]``; ``None`` if no clip becomes a still."""
    mirrored: Tensor | None = None
    """Clips that are mirrored left to right, bool ``[B]``; ``None`` for none."""
    first_pass: Tensor | None = None
    """Clips whose latents start from those of a first pass, bool ``[B]``; ``None`` without self-conditioning."""
    frame_t: Tensor | None = None
    """Times of each frame of tokens, float32 ``[B, n, F]``; ``None`` for a model without known frames."""
    start: Tensor | None = None
    """First frame of the clip in a longer one, int64 ``[B]``; ``None`` where clips are not longer."""
    sparse: Tensor | None = None
    """Clips whose level 0 shows frames that are far apart, bool ``[B]``; ``None`` for none."""
    remembers: Tensor | None = None
    """Clips whose latents of level 0 start from those of the window before, bool ``[B]``; ``None`` for none."""
    predicted: Tensor | None = None
    """Frames of tokens that are not known, whose errors alone count: bool ``[B, n, F]``; ``None`` for all."""


def draw(
    config: HPDMConfig,
    batch: int,
    generator: torch.Generator,
    times: tuple[float, float] = (0.0, 1.0),
    dropout: float = 0.0,
    objective: Objective | None = None,
    images: float = 0.0,
    rows: range | None = None,
) -> Draws:
    """Draws the samples of a batch, or some of its rows.

    Settings that are off draw nothing, so that runs from before they existed continue with the same numbers.

    Args:
        config: the model's.
        batch: number of clips B.
        generator: CPU generator, the only source of randomness.
        times: range of the diffusion time.
        dropout: probability that a clip's label or text is dropped.
        objective: how the samples are drawn and weighted; ``None`` for the default.
        images: share of the clips that become still images, see :mod:`hpdm.training.stills`.
        rows: the rows to return, whose values do not depend on which they are; ``None`` for all of them, of which the
            noise is drawn at once: other numbers.

    Raises:
        ValueError: a share of images outside of 0..1.
    """
    objective = objective or Objective()
    # The order of the draws is part of a run: another one would change its loss curve.
    stills = draw_stills(batch, config.resolution[0], images, generator)
    mirrored = draw_mirrored(batch, generator) if objective.flip else None
    levels = _cut(config, generator) if objective.cuts else config.levels
    boxes = sample_boxes(config, batch, generator, objective.boxes or "uniform")[:, :levels]
    t = draw_times((batch, levels), times, generator, objective)
    shape = (levels, config.channels, *config.patch)
    noise = draw_noise(batch, shape, generator, rows)
    dropped = torch.rand(batch, generator=generator) < dropout
    trained = torch.ones(t.shape)
    if objective.clean_context:
        t, trained = finish_lower_levels(t, config.levels, objective, generator)
    signal = torch.tensor(config.signal_scales[:levels])
    first_pass = draw_first_pass(config, batch, generator)
    frame_t = predicted = None
    if config.known_frames:
        t, frame_t, predicted = draw_frames(
            t, config.grid[0], objective, generator, trained == 0, spacing=config.spacing
        )
    start, sparse, remembers = _draw_of_long_clips(config, batch, objective, generator, stills)
    if sparse is not None:
        trained = _without_sparse_context(trained, sparse, objective.sparse)
    weight = trained * loss_weight(objective.weighting, t, signal)
    if objective.cuts:
        weight = weight / _probability_of_levels(config)[:levels]
    drawn = Draws(
        boxes, t, noise, weight, signal, dropped, stills, mirrored, first_pass, frame_t, start, sparse, remembers,
        predicted,
    )  # fmt: skip
    return drawn if rows is None else _only_rows(drawn, slice(rows.start, rows.stop))


def _draw_of_long_clips(
    config: HPDMConfig, batch: int, objective: Objective, generator: torch.Generator, stills: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """First frames of the clips in longer ones, which of them are sparse on level 0, and which remember the past.

    A still is not sparse, and remembers nothing.
    """
    if config.clip_frames == config.resolution[0]:
        return None, None, None
    room = config.clip_frames - config.resolution[0] - config.past_frames
    start = config.past_frames + torch.randint(room + 1, (batch,), generator=generator)
    sparse = torch.rand(batch, generator=generator) < objective.sparse if config.spacing > 1 else None
    remembers = torch.rand(batch, generator=generator) < objective.remembered if config.memory else None
    if sparse is not None and remembers is not None:
        remembers &= ~sparse
    if stills is not None:
        moves = (stills != stills[:, :1]).any(dim=1)
        sparse = None if sparse is None else sparse & moves
        remembers = None if remembers is None else remembers & moves
    return start, sparse, remembers


def _without_sparse_context(trained: Tensor, sparse: Tensor, share: float) -> Tensor:
    """Weights ``[B, n]`` where level 0 of some clips is ``sparse [B]``: above it, the context is wrong there."""
    others = torch.where(sparse[:, None], 0.0, trained / (1 - share))
    return torch.where(torch.arange(trained.shape[1]) == 0, trained, others)


def _only_rows(draws: Draws, rows: slice) -> Draws:
    """The rows of everything that was drawn for the whole batch, which the noise was not."""
    chosen = Draws._make(None if t is None else t[rows] for t in draws)
    return chosen._replace(noise=draws.noise, signal=draws.signal)


def draw_first_pass(config: HPDMConfig, batch: int, generator: torch.Generator) -> Tensor | None:
    """Which of ``batch`` clips start from the latents of a first pass: bool ``[B]``; ``None`` if none ever does."""
    return torch.rand(batch, generator=generator) < config.self_conditioning if config.self_conditioning else None


def finish_lower_levels(
    t: Tensor, levels: int, objective: Objective, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Shows finished lower levels in a share of the samples, as sampling does.

    With probability ``objective.clean_context`` a level k is drawn from 1 .. L-1, and all levels below it get one small
    time: 0 in half of these samples, uniform up to ``objective.context_t_max`` in the others. The errors of these lower
    levels are not trained. At time 0 v is the noise alone, of which the sample shows nothing, so they would be large
    and teach nothing; and without them each level is trained on the times that it has otherwise.

    Args:
        t: times of the lowest n levels, ``[B, n]``.
        levels: levels L of the pyramid.
        objective: gives the share and the largest small time.
        generator: CPU generator.

    Returns:
        Times and weights of the errors, ``[B, n]`` both: 0 where a level is finished, else one over the probability
        that the level is not.
    """
    batch, count = t.shape
    if levels == 1:
        return t, torch.ones_like(t)
    share = objective.clean_context or 0.0
    shown = torch.rand(batch, generator=generator) < share
    above = torch.randint(1, levels, (batch,), generator=generator)  # k
    small = torch.rand(batch, generator=generator) * objective.context_t_max
    small = small * torch.randint(2, (batch,), generator=generator)
    level = torch.arange(count)
    finished = shown[:, None] & (level < above[:, None])  # [B, n]
    probability = 1 - share * (levels - 1 - level) / (levels - 1)  # [n], that a level is not finished
    return torch.where(finished, small[:, None], t), ~finished / probability


def _cut(config: HPDMConfig, generator: torch.Generator) -> int:
    """A random number of levels to train, uniform from two to all of them (appendix D.6, "random pyramid cuts").

    Two, so that every weight takes part in every step, which DDP and FSDP require: fusions have no part in level 0.
    """
    if config.levels <= 2:
        return config.levels
    return int(torch.randint(2, config.levels + 1, (), generator=generator))


def _probability_of_levels(config: HPDMConfig) -> Tensor:
    """The probability that a level is not cut, ``[L]``."""
    level = torch.arange(config.levels)
    return torch.where(level < 2, 1.0, (config.levels - level) / max(config.levels - 1, 1))
