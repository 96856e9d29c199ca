"""Starts a video network from the weights of a network for images (LVDM section 5).

What works in space takes the weights of the image network; what works in time starts as the identity. The video network
then treats every frame as the image network does, if its normalization takes the statistics of a frame
(``norm="frame"``); with those of a clip it does so for clips of equal frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hpdm.latent.temporal_attention import TemporalAttention
from hpdm.latent.unet import FactorizedUNet
from hpdm.latent.unet_blocks import zero_started

ADDED = ("known_mask.", "known_times.")
"""How the names of those parameters begin that may be added to a trained network: as they start, they change
nothing."""


@torch.no_grad()
def start_from_image(
    model: FactorizedUNet, weights: Mapping[str, Tensor], names: Mapping[str, str] | None = None
) -> None:
    """Starts ``model`` from the weights of an image network with the same blocks in space.

    Args:
        model: any weights; all are replaced but those of temporal attention, of which the output alone is set to zero.
        weights: the image network's, by name. Weights of 1x1 convolutions serve linear maps.
        names: names in ``weights`` of the parameters of ``model``; those that are not in it have the same name in both.

    Raises:
        ValueError: weights that are missing, that are of another shape, or that no parameter takes; the message names
            the first one.
    """
    names = names or {}
    taken = set()
    for name, parameter in model.named_parameters():
        if ".temporal." in name or name.startswith(ADDED):
            continue
        source = names.get(name, name)
        if source not in weights:
            raise ValueError(f"weights: got none named {source!r}, expected one for {name}")
        parameter.copy_(_of_shape(weights[source], parameter.shape, source))
        taken.add(source)
    unused = sorted(set(weights) - taken)
    if unused:
        raise ValueError(f"weights: got {unused[0]!r}, expected only those that the network has")
    for module in (model.known_mask, model.known_times):
        if module is not None:
            zero_started(module)
    for part in model.modules():
        if isinstance(part, TemporalAttention):
            zero_started(part.out)


def _of_shape(weight: Tensor, shape: torch.Size, name: str) -> Tensor:
    """``weight``, without the kernel axes of a 1x1 convolution where ``shape`` has none."""
    if weight.shape[: len(shape)] != shape or weight.numel() != shape.numel():
        raise ValueError(f"weights: got shape {tuple(weight.shape)} for {name!r}, expected {tuple(shape)}")
    return weight.reshape(shape)
