"""The training objective of latent diffusion: the error of what the network predicts of noised latents (LVDM eq. 7).

Everything here works on latents; what turns clips into them comes before. What is random is drawn on the CPU, as in
patch diffusion, so that every device sees the same numbers and the losses read nothing from the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hpdm.checks import check_choice, check_shape
from hpdm.conditioning import without_dropped
from hpdm.frames import draw_frames, mean_over_predicted
from hpdm.latent.unet_config import UNetConfig
from hpdm.objective import Objective, draw_mirrored, draw_noise, draw_times, loss_weight
from hpdm.process import COSINE, SCHEDULES, Schedule, mixture, prediction_target
from hpdm.text import MAX_LENGTH
from hpdm.training.stills import draw_stills, show_frames

Loss = Literal["l2", "l1"]
"""Squared error, as in the paper, or absolute error, as in the released configs."""


class Draws(NamedTuple):
    """What is random in the losses of B clips of T latent frames, and what follows from it alone."""

    t: Tensor
    """Diffusion times of the clips, float32 ``[B]``."""
    noise: Tensor
    """Standard normal, float32 ``[B, z, T, h, w]``."""
    gamma: Tensor
    """Share of signal of every frame, float32 ``[B, T]``."""
    weight: Tensor
    """Weights of the errors, float32 ``[B]``."""
    dropped: Tensor
    """Clips without their label or text, bool ``[B]``."""
    stills: Tensor | None = None
    """For each frame of the video the number of the frame that it shows, int64 ``[B, F]``; ``None`` if no clip becomes
    a still. For what makes the latents."""
    mirrored: Tensor | None = None
    """Clips that are mirrored left to right, bool ``[B]``; ``None`` for none. For what makes the latents."""
    frame_t: Tensor | None = None
    """Times of the frames, float32 ``[B, T]``; ``None`` for a network without known frames."""
    predicted: Tensor | None = None
    """Frames that are not known, whose errors alone count: bool ``[B, T]``; ``None`` for all."""
    start: Tensor | None = None
    """First latent of the clip in a longer one, int64 ``[B]``; ``None`` where clips are not longer. For what makes the
    latents."""
    sparse: Tensor | None = None
    """Clips whose latents are far apart, bool ``[B]``; ``None`` for a network without a spacing."""


def draw(
    config: UNetConfig,
    batch: int,
    generator: torch.Generator,
    *,
    frames: int,
    times: tuple[float, float] = (0.0, 1.0),
    objective: Objective | None = None,
    dropout: float = 0.0,
    images: float = 0.0,
    rows: range | None = None,
) -> Draws:
    """Draws the samples of a batch, or some of its rows.

    Known frames follow :func:`hpdm.frames.draw_frames`; the "mask" has no rolling clips, which know their first frames
    in their place. Their noise is uniform in the time of the network's own schedule, up to where there is as much noise
    as at ``objective.known_t_max`` of the cosine schedule: by default up to LVDM's s = 249 of 1000.

    Args:
        config: the network's.
        batch: number of clips B.
        generator: CPU generator, the only source of randomness.
        frames: frames F of a video, before they are encoded; with a spacing those of the longer clip.
        times: range of the diffusion time.
        objective: how the samples are drawn and weighted; ``None`` for the default.
        dropout: probability that a clip's label or text is dropped.
        images: share of the clips that become still images, see :mod:`hpdm.training.stills`.
        rows: the rows to return, whose values do not depend on which they are; ``None`` for all of them, of which the
            noise is drawn at once: other numbers.

    Raises:
        ValueError: a share of images outside of 0..1.
    """
    objective = objective or Objective()
    schedule = SCHEDULES[config.schedule]
    # The order of the draws is part of a run: another one would change its loss curve.
    stills = draw_stills(batch, frames, images, generator)
    mirrored = draw_mirrored(batch, generator) if objective.flip else None
    t = draw_times((batch, 1), times, generator, objective)  # [B, 1]
    noise = draw_noise(batch, (config.channels, *config.latent), generator, rows)
    dropped = torch.rand(batch, generator=generator) < dropout
    frame_t = predicted = None
    frame_times = t.expand(batch, config.latent[0])  # [B, T]
    if config.known != "none":
        law = dataclasses.replace(objective, known_t_max=time_on(schedule, objective.known_t_max))
        nothing = torch.zeros(batch, 1, dtype=torch.bool)
        drawn = draw_frames(
            t, config.latent[0], law, generator, nothing, rolling_levels=1 if config.known == "times" else 0,
            spacing=config.spacing,
        )  # fmt: skip
        t, frame_t, predicted = drawn.t, drawn.frame_t[:, 0], drawn.predicted[:, 0]
        frame_times = frame_t
    weight = loss_weight(objective.weighting, t[:, 0], torch.ones(1), schedule, config.prediction)
    gamma = schedule.gamma(frame_times)
    start = sparse = None
    if config.spacing > 1:
        start, sparse = _draw_sparse(config, batch, generator, objective, stills)
    of_all = Draws(t[:, 0], noise, gamma, weight, dropped, stills, mirrored, frame_t, predicted, start, sparse)
    if rows is None:
        return of_all
    chosen = Draws._make(None if value is None else value[rows.start : rows.stop] for value in of_all)
    return chosen._replace(noise=noise)


def _draw_sparse(
    config: UNetConfig, batch: int, generator: torch.Generator, objective: Objective, stills: Tensor | None
) -> tuple[Tensor, Tensor]:
    """First latents of the clips in longer ones, and which clips are sparse; a still is not."""
    room = (config.latent[0] - 1) * (config.spacing - 1)
    start = torch.randint(room + 1, (batch,), generator=generator)
    sparse = torch.rand(batch, generator=generator) < objective.sparse
    return start, sparse if stills is None else sparse & (stills != stills[:, :1]).any(dim=1)


def time_on(schedule: Schedule, t: float) -> float:
    """The time on a schedule at which there is as much noise as at the time ``t`` of the cosine schedule."""
    return float(schedule.time_of_sigma(torch.tensor(COSINE.sigma(t), dtype=torch.float64)))


def clip_of(config: UNetConfig, latents: Tensor, draws: Draws) -> Tensor:
    """The clips that are drawn of the latents of longer ones: consecutive latents, or those that are far apart.

    Args:
        config: the network's.
        latents: ``[B, z, (T - 1) * spacing + 1, h, w]``.
        draws: with ``start``, and ``sparse`` or not.

    Returns:
        ``[B, z, T, h, w]``.
    """
    if draws.start is None:
        return latents
    step = torch.arange(config.latent[0], device=latents.device)
    index = draws.start[:, None] + step  # [B, T]
    if draws.sparse is not None:
        index = torch.where(draws.sparse[:, None], step * config.spacing, index)
    return show_frames(latents, index)


def latent_error(
    network: Callable[..., Tensor],
    config: UNetConfig,
    latents: Tensor,
    draws: Draws,
    labels: Tensor | None = None,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    loss: Loss = "l2",
) -> Tensor:
    """The error of what the network predicts, per clip, ``[B]``; its mean is the training loss.

    It is the mean over the frames that are not known, weighted as drawn. All tensors are on the network's device, which
    then neither waits for the host nor reads from it.

    Args:
        network: a :class:`hpdm.latent.unet.FactorizedUNet`, or what is called in its place, e.g. its DDP wrapper.
        config: the network's.
        latents: clean, of unit variance, ``[B, z, T, h, w]`` floating point.
        draws: what is random, for B clips.
        labels: int64 ``[B]``, or ``None`` for a network without classes.
        text: embeddings ``[B, S, text_width]`` for a network with text, see :func:`hpdm.text.collate_text`.
        text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
        loss: squared or absolute error.

    Raises:
        ValueError: latents of another shape than the noise, or an unknown loss.
    """
    check_choice("loss", loss, Loss)
    check_shape("latents", latents, tuple(draws.noise.shape))
    labels, text_mask = without_dropped(labels, text, text_mask, draws.dropped, config.classes)
    g = draws.gamma[:, None, :, None, None]  # [B, 1, T, 1, 1]
    noised = mixture(latents, draws.noise, g)
    target = prediction_target(config.prediction, latents, draws.noise, g)
    said = predict(network, noised, draws.t, labels, text, text_mask, draws.frame_t, draws.sparse)
    difference = said - target
    error = difference.square() if loss == "l2" else difference.abs()
    frames = error.mean(dim=(1, 3, 4))  # [B, T]
    if draws.predicted is None:
        return frames.mean(dim=1) * draws.weight
    return mean_over_predicted(frames, draws.predicted) * draws.weight


def predict(
    network: Callable[..., Tensor],
    x: Tensor,
    t: Tensor,
    labels: Tensor | None = None,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    frame_t: Tensor | None = None,
    sparse: Tensor | None = None,
) -> Tensor:
    """Calls the network as a training step does; arguments and result as of its ``forward``."""
    given = {"frame_t": frame_t, "sparse": sparse}
    told = {name: value for name, value in given.items() if value is not None}
    return network(x, t, labels, text, text_mask, **told)


def example_inputs(config: UNetConfig, batch: int) -> dict[str, Tensor]:
    """Arguments of the network's ``forward``: zeros, with texts of the longest length."""
    inputs: dict[str, Any] = {"x": torch.zeros(batch, config.channels, *config.latent), "t": torch.zeros(batch)}
    if config.known != "none":
        inputs["frame_t"] = torch.zeros(batch, config.latent[0])
    if config.spacing > 1:
        inputs["sparse"] = torch.zeros(batch, dtype=torch.bool)
    if config.conditioning == "class":
        inputs["labels"] = torch.zeros(batch, dtype=torch.long)
    if config.conditioning == "text":
        inputs["text"] = torch.zeros(batch, MAX_LENGTH, config.text_width)
        inputs["text_mask"] = torch.ones(batch, MAX_LENGTH, dtype=torch.bool)
    return inputs
