"""The training objective: the error of v on one patch of every level, jointly (paper eq. 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpdm.checks import check_choice
from hpdm.conditioning import without_dropped
from hpdm.frames import mean_over_predicted, of_pixels
from hpdm.objective import Context, draw_times, mirror, on_device
from hpdm.patch.boxes import at_border, extract_patches, sample_boxes
from hpdm.patch.config import HPDMConfig
from hpdm.patch.draws import Draws, draw_first_pass
from hpdm.patch.model import HPDM
from hpdm.patch.real_levels import level_of_video
from hpdm.process import add_noise, network_input
from hpdm.text import MAX_LENGTH
from hpdm.training.stills import show_frames

EVALUATED_AT_BORDERS = 0.25
"""In evaluations, share of the patches that are put at a border of the video, for each axis: there are few otherwise,
and a quarter of the tiles of a sampled video or more."""


def denoising_error(
    model: HPDM,
    video: Tensor,
    labels: Tensor | None,
    draws: Draws,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Mean squared error of v per clip and level, ``[B, L]``; its mean is the training loss.

    All arguments are on the model's device, which then neither waits for the host nor reads from it.

    The errors are weighted as drawn. Those of levels that are not trained, because they are finished or cut, are 0.

    With latent self-conditioning every call takes one more forward pass, without gradients. Its final latents are given
    to the samples that were drawn for it.

    Args:
        model: the network.
        video: uint8 ``[B, C, F, H, W]`` at the target resolution.
        labels: int64 ``[B]``, or ``None`` for a model without classes.
        draws: what is random, for B clips.
        text: embeddings ``[B, S, text_width]`` for a model with text, see :func:`hpdm.text.collate_text`.
        text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
        network: called in place of the model, e.g. its DDP wrapper; ``None`` for the model itself.
    """
    config = model.config
    if draws.mirrored is not None:
        video = mirror(video, draws.mirrored)
    clip = video if draws.start is None else _frames_from(video, draws.start, config.resolution[0])
    if draws.stills is not None:
        clip = show_frames(clip, draws.stills)
    x = extract_patches(clip, draws.boxes, config, backend=model.kernels)  # [B, n, C, f, h, w], n levels
    if draws.sparse is not None:
        x = _with_sparse_level_0(config, x, video, draws.sparse)
    past = None
    if draws.remembers is not None and draws.start is not None:
        before = _frames_from(video, draws.start - config.past_frames, config.resolution[0])
        past = level_of_video(config, before, 0)  # [B, C, f, h, w]
    labels, text_mask = without_dropped(labels, text, text_mask, draws.dropped, config.classes)
    error = _error_of_v(model, x, draws, (labels, text, text_mask), network, past) * draws.weight
    return functional.pad(error, (0, config.levels - error.shape[1]))  # levels that are cut have no error


def evaluation_error(
    model: HPDM,
    video: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    times: tuple[float, float] = (0.0, 1.0),
    context: Context = "clean",
    context_noise: float = 0.0,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of v per clip and level, ``[B, L]``, and which of the patches touch the video's border.

    Each level is measured at times in the range ``times``, with the levels below it as ``context`` says. Boxes follow
    the uniform law, with more of them at the borders (:data:`EVALUATED_AT_BORDERS`).

    Args:
        model, video, labels, generator, text, text_mask: as of :func:`denoising_error`.
        times: range of the level's own diffusion time.
        context: ``"clean"``: levels below are finished, at time ``context_noise``; ``"same"``: their times are in the
            range ``times`` too; ``"independent"``: their times are uniform in [0, 1].
        context_noise: diffusion time of clean levels below.

    Returns:
        Errors and borders, float and bool ``[B, L]``; the borders on the CPU.

    Raises:
        ValueError: unknown ``context``.
    """
    check_choice("context", context, Context)
    config, device, batch = model.config, video.device, len(video)
    boxes = sample_boxes(config, batch, generator, borders=EVALUATED_AT_BORDERS)  # [B, L, 6]
    border, boxes = at_border(boxes, config), boxes.to(device)
    x = extract_patches(video, boxes, config, backend=model.kernels)  # [B, L, C, f, h, w]
    shape = (batch, config.levels)
    t = draw_times(shape, times, generator)  # [B, L]
    noise = torch.randn(x.shape, generator=generator).to(device)

    def error(t: Tensor) -> Tensor:
        """Of the lowest n levels at times ``t``, both ``[B, n]``."""
        n = t.shape[1]
        draws = Draws(
            boxes=boxes[:, :n],
            t=t,
            noise=noise[:, :n],
            weight=torch.ones_like(t),
            signal=torch.tensor(config.signal_scales[:n]),
            dropped=torch.zeros(batch, dtype=torch.bool),
            first_pass=draw_first_pass(config, batch, generator),
        )
        return _error_of_v(model, x[:, :n], on_device(draws, device), (labels, text, text_mask))

    if context == "same":
        return error(t), border
    below = draw_times(shape, (0.0, 1.0), generator) if context == "independent" else torch.full(shape, context_noise)
    errors = []
    for n in range(1, config.levels + 1):  # the lowest n levels, of which the last one is measured
        errors.append(error(torch.cat((below[:, : n - 1], t[:, n - 1 : n]), dim=1))[:, -1])
    return torch.stack(errors, dim=1), border


def _error_of_v(
    model: HPDM,
    x: Tensor,
    draws: Draws,
    conditions: tuple[Tensor | None, Tensor | None, Tensor | None],
    network: Callable[..., Tensor] | None = None,
    past: Tensor | None = None,
) -> Tensor:
    """Squared error of v, ``[B, n]``, on clean patches ``x [B, n, C, f, h, w]`` of the lowest n levels.

    ``conditions`` are labels, texts and their mask; ``past [B, C, f, h, w]`` is level 0 of the window before.
    """
    network = model if network is None else network  # a compiled module has no truth value
    per_token = model.config.tokenizer[0]
    times, signal, named = draws.t, draws.signal, {}
    if draws.frame_t is not None:
        times, signal = of_pixels(draws.frame_t, per_token), signal[:, None, None]  # [B, n, 1, f], [n, 1, 1]
        named["frame_t"] = draws.frame_t
    if draws.sparse is not None:
        named["sparse"] = draws.sparse
    if past is not None and draws.remembers is not None:
        named["memory"] = _latents_of_past(network, past, draws, conditions)
    noised, target = add_noise(x, draws.noise, times, signal)  # [B, n, C, f, h, w] both
    inputs = (network_input(noised, times, signal), draws.boxes, draws.t, *conditions)
    error = (predict(network, draws.first_pass, *inputs, **named) - target).square()
    if draws.predicted is None:
        return error.mean(dim=(2, 3, 4, 5))  # [B, n]
    return mean_over_predicted(error.mean(dim=(2, 4, 5)), of_pixels(draws.predicted, per_token)[..., 0, :])


def predict(network: Callable[..., Any], first_pass: Tensor | None, *inputs: Any, **named_inputs: Any) -> Tensor:
    """The network's v ``[B, n, C, f, h, w]``, by all calls of it that a training step makes.

    Args:
        network: as of :func:`denoising_error`.
        first_pass: the samples that start from the final latents of a first pass, bool ``[B]``; ``None`` for a model
            without self-conditioning.
        inputs, named_inputs: arguments of :meth:`HPDM.forward`.
    """
    if first_pass is not None:
        named_inputs["latents"] = _latents_of_a_first_pass(network, first_pass, *inputs, **named_inputs)
    v: Tensor = network(*inputs, **named_inputs)
    return v


def _frames_from(video: Tensor, start: Tensor, frames: int) -> Tensor:
    """``frames`` frames of each clip ``[B, C, F, H, W]`` from frame ``start [B]`` on."""
    return show_frames(video, start[:, None] + torch.arange(frames, device=video.device))


def _with_sparse_level_0(config: HPDMConfig, x: Tensor, video: Tensor, sparse: Tensor) -> Tensor:
    """``x [B, n, C, f, h, w]`` with frames of level 0 that are far apart, from the start of ``video``, where sparse."""
    frames = ((config.patch[0] - 1) * config.spacing + 1) * config.frame_scale
    apart = level_of_video(config, video[:, :, :frames], 0)[:, :, :: config.spacing]  # [B, C, f, h, w]
    level_0 = torch.where(sparse[:, None, None, None, None], apart, x[:, 0])
    return torch.cat((level_0[:, None], x[:, 1:]), dim=1)


@torch.no_grad()
def _latents_of_past(
    network: Callable[..., Any],
    past: Tensor,
    draws: Draws,
    conditions: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    """Final latents of level 0 of the window before, ``[B, M, E]``; zeros for clips that do not remember it."""
    t = torch.zeros_like(draws.t[:, :1])
    boxes = torch.zeros_like(draws.boxes[:, :1])
    boxes[..., 3:] = 1.0
    x = network_input(past[:, None] * draws.signal[0], t, draws.signal[:1])
    _, latents = network(x, boxes, t, *conditions, return_latents=True)
    kept: Tensor = latents[:, 0] * draws.remembers[:, None, None] if draws.remembers is not None else latents[:, 0]
    return kept


@torch.no_grad()
def _latents_of_a_first_pass(network: Callable[..., Any], kept: Tensor, *inputs: Any, **named_inputs: Any) -> Tensor:
    """Final latents ``[B, L, M, E]`` of a first pass, for the samples that are ``kept``; zeros for the others."""
    # The pass takes all samples, not only those that are kept, so that all ranks make the same calls.
    _, latents = network(*inputs, **named_inputs, return_latents=True)
    return latents * kept[:, None, None, None]


def example_inputs(config: HPDMConfig, batch: int) -> dict[str, Tensor]:
    """Arguments of :meth:`HPDM.forward`: zeros, in the first box of every level, with texts of the longest length."""
    boxes = torch.zeros(batch, config.levels, 6)
    boxes[..., 3:] = torch.tensor([config.level_scale(level) for level in range(config.levels)])
    inputs = {
        "x": torch.zeros(batch, config.levels, config.channels, *config.patch),
        "boxes": boxes,
        "t": torch.zeros(batch, config.levels),
    }
    if config.known_frames:
        inputs["frame_t"] = torch.zeros(batch, config.levels, config.grid[0])
    if config.spacing > 1:
        inputs["sparse"] = torch.zeros(batch, dtype=torch.bool)
    if config.memory:
        inputs["memory"] = torch.zeros(batch, config.latents, config.latent_width)
    if config.conditioning == "class":
        inputs["labels"] = torch.zeros(batch, dtype=torch.long)
    if config.conditioning == "text":
        inputs["text"] = torch.zeros(batch, MAX_LENGTH, config.text_width)
        inputs["text_mask"] = torch.ones(batch, MAX_LENGTH, dtype=torch.bool)
    return inputs
