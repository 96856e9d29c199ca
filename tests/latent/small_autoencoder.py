"""An autoencoder and its training that are small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpdm import presets
from hpdm.latent.autoencoder import VideoAutoencoder
from hpdm.latent.config import AutoencoderConfig
from hpdm.training import options
from hpdm.training.options import TrainOptions


def small_config(**changes: Any) -> AutoencoderConfig:
    """Clips of 8x32x32 pixels and 4 channels after the first convolution; the stem and factors of the tiny preset."""
    return presets.get("lvdm_ae_tiny").replace(**({"resolution": (8, 32, 32), "width": 4} | changes))


def random_autoencoder(config: AutoencoderConfig, seed: int = 0, recompute: str = "none") -> VideoAutoencoder:
    """An autoencoder in eval mode with random weights and latents that are not normalized."""
    torch.manual_seed(seed)
    return VideoAutoencoder(config, recompute=recompute).eval()


def train_options(clips: Path, out: Path, **changes: Any) -> TrainOptions:
    """Six steps of the tiny preset on clips of 8x32x32 pixels."""
    values = {
        "data": clips, "out": out, "preset": "lvdm_ae_tiny", "resolution": (8, 32, 32), "steps": 6, "batch": 3,
        "warmup": 2, "lr": 2e-3, "log_every": 1, "save_every": 3, "workers": 0,
    }  # fmt: skip
    return options.train_options(**(values | changes))
