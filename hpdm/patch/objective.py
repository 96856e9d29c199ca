"""The training objective: the error of v on one patch of every level, jointly (paper eq. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpdm.checks import check_choice
from hpdm.objective import Context, Objective, draw_times, flipped, loss_weight
from hpdm.patch.boxes import at_border, extract_patches, sample_boxes
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.process import add_noise, network_input
from hpdm.text import MAX_LENGTH
from hpdm.training.stills import still_images

EVALUATED_AT_BORDERS = 0.25
"""In evaluations, share of the patches that are put at a border of the video, for each axis: there are few otherwise,
and a quarter of the tiles of a sampled video or more."""


def denoising_error(
    model: HPDM,
    video: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    times: tuple[float, float] = (0.0, 1.0),
    dropout: float = 0.0,
    objective: Objective | None = None,
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    images: float = 0.0,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Mean squared error of v per clip and level, ``[B, L]``; its mean is the training loss.

    Boxes, times, noise, conditioning dropout and which clips become images are drawn from ``generator`` on the CPU, so
    that every device sees the same. Each level has its own time.

    With a weighting the errors are weighted. Errors that are not trained (see :func:`finish_lower_levels`, and levels
    that ``objective.cuts`` leaves out) are 0, and the others so much larger that the expectation stays.

    With latent self-conditioning every call takes one more forward pass, without gradients. Its final latents are given
    to a random share of the samples, which is drawn from ``generator`` too.

    Args:
        model: the network.
        video: uint8 ``[B, C, F, H, W]`` at the target resolution.
        labels: int64 ``[B]``, or ``None`` for a model without classes.
        generator: CPU generator.
        times: range of the diffusion time.
        dropout: probability that a clip's label or text is dropped.
        objective: how the samples are drawn and weighted; ``None`` for the default.
        text: embeddings ``[B, S, text_width]`` for a model with text, see :func:`hpdm.text.collate_text`.
        text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
        images: share of the clips that become still images, see :mod:`hpdm.training.stills`.
        network: called in place of the model, e.g. its DDP wrapper; ``None`` for the model itself.

    Raises:
        ValueError: a share of images outside of 0..1.
    """
    config, device, objective = model.config, video.device, objective or Objective()
    # Settings that are off draw nothing, so that runs from before they existed continue with the same numbers.
    video = still_images(video, images, generator)
    if objective.flip:
        video = flipped(video, generator)
    levels = _cut(config, generator) if objective.cuts else config.levels
    boxes = sample_boxes(config, len(video), generator, objective.boxes or "uniform")[:, :levels].to(device)
    x = extract_patches(video, boxes, config, backend=model.kernels)  # [B, n, C, f, h, w], n levels
    t = draw_times((len(video), levels), times, generator, objective)  # [B, n]
    noise = torch.randn(x.shape, generator=generator).to(device)
    dropped = (torch.rand(len(video), generator=generator) < dropout).to(device)  # [B]
    if labels is not None:
        labels = labels.masked_fill(dropped, config.classes)
    if text is not None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device) if text_mask is None else text_mask
        text_mask = text_mask & ~dropped[:, None]
    trained = torch.ones(t.shape)  # [B, n]
    if objective.clean_context:
        t, trained = finish_lower_levels(t, config.levels, objective, generator)
    weight = trained * loss_weight(objective.weighting, t, torch.tensor(config.signal_scales[:levels]))  # [B, n]
    error = _error_of_v(model, x, boxes, t.to(device), noise, (labels, text, text_mask), generator, network)
    error = error * weight.to(device)
    return _without_cut(error, config.levels) if objective.cuts else error


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
    config, device = model.config, video.device
    boxes = sample_boxes(config, len(video), generator, borders=EVALUATED_AT_BORDERS)  # [B, L, 6]
    border, boxes = at_border(boxes, config), boxes.to(device)
    x = extract_patches(video, boxes, config, backend=model.kernels)  # [B, L, C, f, h, w]
    shape = (len(video), config.levels)
    t = draw_times(shape, times, generator)  # [B, L]
    noise = torch.randn(x.shape, generator=generator).to(device)
    conditions = (labels, text, text_mask)
    if context == "same":
        return _error_of_v(model, x, boxes, t.to(device), noise, conditions, generator), border
    below = draw_times(shape, (0.0, 1.0), generator) if context == "independent" else torch.full(shape, context_noise)
    errors = []
    for n in range(1, config.levels + 1):  # the lowest n levels, of which the last one is measured
        t_n = torch.cat((below[:, : n - 1], t[:, n - 1 : n]), dim=1).to(device)
        error = _error_of_v(model, x[:, :n], boxes[:, :n], t_n, noise[:, :n], conditions, generator)
        errors.append(error[:, -1])
    return torch.stack(errors, dim=1), border


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


def _without_cut(error: Tensor, levels: int) -> Tensor:
    """Errors of the lowest n levels, ``[B, n] -> [B, L]``, whose expectation is that without cuts."""
    batch, count = error.shape
    level = torch.arange(count, device=error.device)
    probability = torch.where(level < 2, 1.0, (levels - level) / max(levels - 1, 1))  # that a level is trained
    return torch.cat((error / probability, error.new_zeros(batch, levels - count)), dim=1)


def _error_of_v(
    model: HPDM,
    x: Tensor,
    boxes: Tensor,
    t: Tensor,
    noise: Tensor,
    conditions: tuple[Tensor | None, Tensor | None, Tensor | None],
    generator: torch.Generator,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Squared error of v, ``[B, n]``, on clean patches ``x [B, n, C, f, h, w]`` of the lowest n levels.

    ``conditions`` are labels, texts and their mask.
    """
    config = model.config
    network = model if network is None else network  # a compiled module has no truth value
    signal = torch.tensor(config.signal_scales[: x.shape[1]], device=x.device)  # [n]
    noised, target = add_noise(x, noise, t, signal)  # [B, n, C, f, h, w] both
    inputs = (network_input(noised, t, signal), boxes, t, *conditions)
    if config.self_conditioning:
        latents = _latents_of_a_first_pass(network, inputs, config.self_conditioning, generator)
        predicted = network(*inputs, latents=latents)
    else:
        predicted = network(*inputs)
    return (predicted - target).square().mean(dim=(2, 3, 4, 5))  # [B, n]


@torch.no_grad()
def _latents_of_a_first_pass(
    network: Callable[..., Any], inputs: Sequence[Any], share: float, generator: torch.Generator
) -> Tensor:
    """Final latents ``[B, L, M, E]`` of a first pass, for a random ``share`` of the samples; zeros for the others."""
    batch = inputs[0].shape[0]
    kept = (torch.rand(batch, generator=generator) < share).to(inputs[0].device)
    # The pass takes all samples, not only those that are kept, so that all ranks make the same calls.
    _, latents = network(*inputs, return_latents=True)
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
    if config.conditioning == "class":
        inputs["labels"] = torch.zeros(batch, dtype=torch.long)
    if config.conditioning == "text":
        inputs["text"] = torch.zeros(batch, MAX_LENGTH, config.text_width)
        inputs["text_mask"] = torch.ones(batch, MAX_LENGTH, dtype=torch.bool)
    return inputs
