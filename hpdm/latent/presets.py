"""Configs and recipes of LVDM's autoencoder, and of a tiny one that trains on a CPU core."""

from __future__ import annotations

from collections.abc import Callable

from hpdm.latent.config import AutoencoderConfig
from hpdm.recipe import Recipe

PUBLISHED_PARAMETERS = {"lvdm_ae": 19e6}
"""LVDM Table 2."""


def lvdm_ae() -> AutoencoderConfig:
    """LVDM's autoencoder for 16x256x256, with normalization per frame in place of the published one per clip."""
    return AutoencoderConfig()


def lvdm_ae_tiny() -> AutoencoderConfig:
    """An autoencoder of 16x64x64 clips with 0.3 M parameters that learns on a CPU core."""
    return AutoencoderConfig(resolution=(16, 64, 64), stem=(1, 2, 2), width=8)


PRESETS: dict[str, Callable[[], AutoencoderConfig]] = {f.__name__: f for f in (lvdm_ae, lvdm_ae_tiny)}

RECIPES: dict[str, Recipe] = {
    # The released code has Adam with a rate of 3.6e-5 and, on each GPU, two batches of one clip per step; it says
    # neither how many GPUs nor how many steps. It averages no weights.
    "lvdm_ae": Recipe(
        steps=100_000, batch=16, optimizer="adamw", lr=3.6e-5, warmup=0, schedule="constant", weight_decay=0.0
    ),
    "lvdm_ae_tiny": Recipe(steps=2000, batch=4, optimizer="adamw", lr=4e-3, warmup=50),
}
