"""The training objective: the error of v on one patch of every level, jointly (paper eq. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hpdm.checks import check_choice
from hpdm.patch.boxes import extract_patches, sample_boxes
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM
from hpdm.process import add_noise, network_input
from hpdm.text import MAX_LENGTH
from hpdm.training.stills import still_images

TimeDistribution = Literal["uniform", "logit-normal"]
""""logit-normal" favors the middle, where shapes are decided (Esser et al. 2024, section 3.1, mean 0, variance 1)."""


def denoising_error(
    model: HPDM,
    video: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    times: tuple[float, float] = (0.0, 1.0),
    dropout: float = 0.0,
    time_distribution: str = "uniform",
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    images: float = 0.0,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Mean squared error of v per clip and level, ``[B, L]``; its mean is the training loss.

    Boxes, times, noise, conditioning dropout and which clips become images are drawn from ``generator`` on the CPU, so
    that every device sees the same. Each level has its own time.

    With latent self-conditioning every call takes one more forward pass, without gradients. Its final latents are given
    to a random share of the samples, which is drawn from ``generator`` too.

    Args:
        model: the network.
        video: uint8 ``[B, C, F, H, W]`` at the target resolution.
        labels: int64 ``[B]``, or ``None`` for a model without classes.
        generator: CPU generator.
        times: range of the diffusion time.
        dropout: probability that a clip's label or text is dropped.
        time_distribution: distribution of the times over that range, see :data:`TimeDistribution`.
        text: embeddings ``[B, S, text_width]`` for a model with text, see :func:`hpdm.text.collate_text`.
        text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
        images: share of the clips that become still images, see :mod:`hpdm.training.stills`.
        network: called in place of the model, e.g. its DDP wrapper; ``None`` for the model itself.

    Raises:
        ValueError: unknown ``time_distribution``, or a share of images outside of 0..1.
    """
    config, device = model.config, video.device
    video = still_images(video, images, generator)
    boxes = sample_boxes(config, len(video), generator).to(device)  # [B, L, 6]
    x = extract_patches(video, boxes, config, backend=model.kernels)  # [B, L, C, f, h, w]
    t = draw_times((len(video), config.levels), times, time_distribution, generator).to(device)  # [B, L]
    noise = torch.randn(x.shape, generator=generator).to(device)
    dropped = (torch.rand(len(video), generator=generator) < dropout).to(device)  # [B]
    if labels is not None:
        labels = labels.masked_fill(dropped, config.classes)
    if text is not None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device) if text_mask is None else text_mask
        text_mask = text_mask & ~dropped[:, None]
    signal = torch.tensor(config.signal_scales, device=device)  # [L]
    noised, target = add_noise(x, noise, t, signal)  # [B, L, C, f, h, w] both
    inputs = (network_input(noised, t, signal), boxes, t, labels, text, text_mask)
    network = network or model
    if config.self_conditioning:
        latents = _latents_of_a_first_pass(network, inputs, config.self_conditioning, generator)
        predicted = network(*inputs, latents=latents)
    else:
        predicted = network(*inputs)
    return (predicted - target).square().mean(dim=(2, 3, 4, 5))  # [B, L]


def draw_times(
    shape: tuple[int, ...], times: tuple[float, float], time_distribution: str, generator: torch.Generator
) -> Tensor:
    """Diffusion times in the range ``times``, on the CPU.

    Raises:
        ValueError: unknown ``time_distribution``.
    """
    check_choice("time_distribution", time_distribution, TimeDistribution)
    first, last = times
    if time_distribution == "uniform":
        share = torch.rand(shape, generator=generator)
    else:
        share = torch.randn(shape, generator=generator).sigmoid()
    return first + (last - first) * share


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
