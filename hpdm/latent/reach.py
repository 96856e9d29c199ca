"""How far the autoencoder sees along time: what a latent depends on, and what a decoded frame depends on.

Both follow from kernels and strides. Normalization per frame looks at no other frame; normalization over the clip looks
at all of them, so that these numbers do not hold for it.
"""

from __future__ import annotations

from typing import NamedTuple

from hpdm.latent.config import DECODER_BLOCKS, ENCODER_BLOCKS, KERNEL, AutoencoderConfig
from hpdm.latent.layers import repeats

INNER = 3
"""Kernel of the convolutions that keep the resolution."""


class Reach(NamedTuple):
    """How many latents on both sides matter."""

    past: int
    future: int


def encoder_reach(config: AutoencoderConfig) -> Reach:
    """How many latents before and after a latent cover the frames that it depends on besides its own."""
    layers = [(INNER, 1)]
    for stride, _, _ in config.strides:
        layers += [(KERNEL, stride), *[(INNER, 1)] * (2 * ENCODER_BLOCKS)]
    layers.append((INNER, 1))
    first = last = 0  # of the positions that latent 0 depends on, from its own layer down to the frames
    for kernel, stride in reversed(layers):
        front, _ = repeats(kernel, stride)
        first, last = first * stride - front, last * stride - front + kernel - 1
    stem, factor = config.stem[0], config.factors[0]
    first, last = first * stem, last * stem + stem - 1
    return Reach(-(first // factor), last // factor)


def decoder_reach(config: AutoencoderConfig) -> Reach:
    """How many latents before and after a latent its frames depend on."""
    layers = []
    for stride, _, _ in config.strides:
        layers += [(KERNEL, stride), *[(INNER, 1)] * (2 * DECODER_BLOCKS)]
    layers.append((INNER, 1))
    first, last = 0, config.factors[0] // config.stem[0] - 1  # of the positions that latent 0's frames depend on
    for kernel, stride in reversed(layers):
        front, _ = repeats(kernel, stride)
        if stride == 1 and kernel == INNER:
            first, last = first - front, last - front + kernel - 1
        else:
            # Position o of a transposed convolution, whose first kernel - 1 results are cut off, takes the padded
            # positions i with 0 <= o + kernel - 1 - i * stride < kernel.
            first, last = -(-first // stride) - front, (last + kernel - 1) // stride - front
    return Reach(-first, last)
