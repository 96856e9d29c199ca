"""What is minimised: the error of v on one patch of every level, jointly (paper eq. 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpdm.patch.boxes import extract_patches, sample_boxes
from hpdm.patch.model import HPDM
from hpdm.process import add_noise, network_input, signal_scales
from hpdm.training.stills import still_images

SPREADS = ("uniform", "logit-normal")


def denoising_error(
    model: HPDM,
    video: Tensor,
    labels: Tensor | None,
    generator: torch.Generator,
    times: tuple[float, float] = (0.0, 1.0),
    dropout: float = 0.0,
    spread: str = "uniform",
    text: Tensor | None = None,
    text_mask: Tensor | None = None,
    images: float = 0.0,
    network: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Mean squared error of v per clip and level, ``[B, L]``; its mean is the training loss.

    Boxes, times, noise, conditioning dropout and which clips become images are drawn from ``generator`` on the CPU, so
    that every device sees the same. Each level has its own time.

    With latent self-conditioning every call takes one more forward pass, without gradients, that finds the latents for
    the samples that are drawn to have them; it draws from ``generator`` once more.

    Args:
        model: the network.
        video: uint8 ``[B, C, F, H, W]`` at the target resolution.
        labels: int64 ``[B]``, or ``None`` for a model without classes.
        generator: CPU generator.
        times: range of the diffusion time.
        dropout: probability that a clip's label or text is dropped.
        spread: how times are spread over the range, one of :data:`SPREADS`: ``"uniform"``, or ``"logit-normal"``, which
            favours the middle, where shapes are decided (Esser et al. 2024, section 3.1, with mean 0 and variance 1).
        text: embeddings ``[B, S, text_width]`` for a model with text, see :func:`hpdm.text.collate_text`.
        text_mask: ``[B, S]`` bool, true where there is text; ``None``: everywhere.
        images: share of the clips that become still images, see :mod:`hpdm.training.stills`.
        network: what is called in the model's place, its wrapper for several processes; ``None`` for the model.

    Raises:
        ValueError: unknown ``spread``, or a share of images outside of 0..1.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread: got {spread!r}, expected one of {', '.join(map(repr, SPREADS))}")
    config, batch, device = model.config, video.shape[0], video.device
    video = still_images(video, images, generator)
    boxes = sample_boxes(config, batch, generator).to(device)
    x = extract_patches(video, boxes, config, backend=model.kernels)
    first, last = times
    shape = (batch, config.levels)
    if spread == "uniform":
        share = torch.rand(shape, generator=generator)
    else:
        share = torch.randn(shape, generator=generator).sigmoid()
    t = (first + (last - first) * share).to(device)
    noise = torch.randn(x.shape, generator=generator).to(device)
    dropped = (torch.rand(batch, generator=generator) < dropout).to(device)
    if labels is not None:
        labels = labels.masked_fill(dropped, config.classes)
    if text is not None:
        text_mask = torch.ones(text.shape[:2], dtype=torch.bool, device=device) if text_mask is None else text_mask
        text_mask = text_mask & ~dropped[:, None]
    signal = signal_scales(config, device)
    noised, target = add_noise(x, noise, t, signal)
    inputs = (network_input(noised, t, signal), boxes, t, labels, text, text_mask)
    network, given = network or model, {}
    if config.self_conditioning:
        known = (torch.rand(batch, generator=generator) < config.self_conditioning).to(device)
        # All samples, whoever was drawn: the processes of a run make the same calls.
        with torch.no_grad():
            _, found = network(*inputs, return_latents=True)
        given = {"latents": found * known[:, None, None, None]}
    predicted = network(*inputs, **given)
    return (predicted - target).square().mean(dim=(2, 3, 4, 5))
