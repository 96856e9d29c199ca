"""Runs of latent diffusion that are small enough for tests: on clips of 8x32x32 pixels, 2x4x4 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpdm import presets, runs, systems
from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.latent_model import LVDM
from hpdm.runs import RunConfig
from hpdm.training import options
from hpdm.training.checkpoint import save_checkpoint
from hpdm.training.ema import EMA, ConstantDecay
from hpdm.training.optim import make_optimizer
from hpdm.training.options import TrainOptions
from tests.latent.small_autoencoder import random_autoencoder, small_config


def save_autoencoder(folder: Path, seed: int = 0, measured: bool = True, **changes: Any) -> Path:
    """A run of an autoencoder with random weights, as if it were trained; returns ``folder``."""
    model = random_autoencoder(small_config(**changes), seed)
    if measured:
        model.latent_mean.normal_()
        model.latent_std.uniform_(0.5, 2)
    about = RunConfig(systems.get("autoencoder"), model.config, [], {"stride": 1, "short": "skip"})
    runs.save_run_config(folder, about)
    save_checkpoint(folder, 1, model, EMA(model, ConstantDecay(0.9)), make_optimizer(model, "adamw", 1e-3, 0.0))
    return folder


def train_latents(clips: Path, out: Path, autoencoder: Path | None, **changes: Any) -> TrainOptions:
    """Six steps of the tiny preset on clips of 8x32x32 pixels."""
    values = {
        "data": clips, "out": out, "preset": "lvdm_tiny", "autoencoder": autoencoder, "resolution": (8, 32, 32),
        "steps": 6, "batch": 3, "warmup": 2, "lr": 2e-3, "log_every": 1, "save_every": 3, "workers": 0,
    }  # fmt: skip
    return options.train_options(**(values | changes))


def small_latent_config(**unet: Any) -> LatentConfig:
    """The tiny preset on clips of 8x32x32 pixels."""
    config = presets.get("lvdm_tiny").replace(autoencoder=small_config()).with_resolution((8, 32, 32))
    return config.replace(unet=config.unet.replace(**unet))


def long_latent_config(**unet: Any) -> LatentConfig:
    """Clips of 16x32x32 pixels, 4x4x4 latents, and sparse ones three latents apart."""
    return small_latent_config().with_resolution((16, 32, 32)).replace_unet(**({"spacing": 3} | unet))


def random_latent_model(config: LatentConfig, seed: int = 0) -> LVDM:
    """A model in eval mode as after some training: no weight is zero, and its latents are measured."""
    torch.manual_seed(seed)
    model = LVDM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.autoencoder.latent_std.fill_(1.5)
    return model
