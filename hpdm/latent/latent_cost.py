"""The work of latent video diffusion, predicted before it runs: encoding, the U-Net, sampling and decoding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.config import AutoencoderConfig
from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.objective import example_inputs
from hpdm.latent.unet import FactorizedUNet
from hpdm.latent.unet_config import UNetConfig
from hpdm.planning.ledger import Ledger, fake_fp32
from hpdm.process import SCHEDULES
from hpdm.sampling import SamplerOptions


# A plan and its line need the same counts, which take part of a second each.
@functools.cache
def unet_flops(config: UNetConfig) -> int:
    """FLOPs (products, convolutions, attention; a multiply-add is two) of one forward pass of one clip."""
    return _counted(lambda: FactorizedUNet(config), lambda unet: unet(**example_inputs(config, 1)))


@functools.cache
def encoding_flops(config: AutoencoderConfig) -> int:
    """FLOPs of encoding one clip."""
    video = lambda: torch.zeros(1, config.channels, *config.resolution)
    return _counted(lambda: VideoAutoencoder(config), lambda model: model.moments(video()))


@functools.cache
def decoding_flops(config: AutoencoderConfig, latent: tuple[int, int, int]) -> int:
    """FLOPs of decoding the latents of one clip."""
    latents = lambda: torch.zeros(1, config.latent_channels, *latent)
    return _counted(lambda: VideoAutoencoder(config), lambda model: model.decode_unnormalized(latents()))


def _counted(build: Callable[[], Any], call: Callable[[Any], object]) -> int:
    """FLOPs of a call of a model, counted on fake tensors."""
    with fake_fp32(), torch.no_grad():
        model = build()
        with Ledger() as ledger:
            call(model)
    return ledger.flops


def rows_per_clip(options: SamplerOptions, config: LatentConfig) -> list[int]:
    """Rows of the network for each prediction of a clip: 2 where it is guided, else 1."""
    sigmas = options.level_solver(0, schedule=SCHEDULES[config.unet.schedule]).prediction_sigmas()
    return [1 + (options.guidance_at(0, sigma) != 1.0) for sigma in sigmas]


def sampling_plan(config: LatentConfig, options: SamplerOptions) -> list[dict[str, Any]]:
    """The rows of :meth:`hpdm.system.System.sampling_plan`: sampling the latents, and decoding them."""
    rows = rows_per_clip(options, config)
    nothing = {"tiles": 1, "cached_blocks": 0, "cache_bytes": 0}
    return [
        {
            "level": "latent", "resolution": config.unet.latent, "steps": options.steps, "predictions": len(rows),
            "network_calls": len(rows), "patches": sum(rows), "flops": sum(rows) * unet_flops(config.unet), **nothing,
        },
        {
            "level": "decode", "resolution": config.resolution, "steps": 0, "predictions": 0, "network_calls": 1,
            "patches": 1, "flops": decoding_flops(config.autoencoder, config.unet.latent), **nothing,
        },
    ]  # fmt: skip


def plan_line(config: LatentConfig, options: SamplerOptions, videos: int, at_a_time: int) -> str:
    """One line to print before sampling: steps and work."""
    rows = sampling_plan(config, options)
    flops = videos * sum(row["flops"] for row in rows)
    return (
        f"{videos} video(s), {at_a_time} at a time: {options.steps} steps of {options.solver}, "
        f"{rows[0]['network_calls']} network calls each, {flops / 1e12:.3g} TFLOP with decoding"
    )
