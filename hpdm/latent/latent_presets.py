"""Presets of latent video diffusion: U-Nets with the autoencoders that they are for, how they are trained and sampled.

A preset's autoencoder has no weights: a run takes those of ``hpdm train --autoencoder``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.presets import lvdm_ae, lvdm_ae_tiny
from hpdm.latent.unet_presets import UNETS
from hpdm.recipe import Recipe


def lvdm_ucf() -> LatentConfig:
    """LVDM for clips of 16x256x256, as large as the paper says."""
    return LatentConfig(UNETS["lvdm_ucf"](), lvdm_ae())


def lvdm_released() -> LatentConfig:
    """The network of the released configs, and their loss."""
    return LatentConfig(UNETS["lvdm_released"](), lvdm_ae(), loss="l1")


def lvdm_predict() -> LatentConfig:
    """The released network that predicts frames after known ones."""
    return LatentConfig(UNETS["lvdm_predict"](), lvdm_ae(), loss="l1")


def lvdm_interpolate() -> LatentConfig:
    """The released network that predicts what lies between two known latent frames."""
    return LatentConfig(UNETS["lvdm_interpolate"](), lvdm_ae(), loss="l1")


def lvdm_tiny() -> LatentConfig:
    """A model of 16x64x64 clips that learns on a CPU core, on the latents of ``lvdm_ae_tiny``."""
    return LatentConfig(UNETS["lvdm_tiny"](), lvdm_ae_tiny())


LATENT_PRESETS: dict[str, Callable[[], LatentConfig]] = {
    f.__name__: f for f in (lvdm_ucf, lvdm_released, lvdm_predict, lvdm_interpolate, lvdm_tiny)
}

# The released configs have AdamW with a constant rate, no schedule, and an average with the decay 0.9999. Neither they
# nor the paper say how many steps; epochs and the size of UCF-101 give about 100,000. The batch of 128 is inferred: two
# clips on each GPU, twice per step, on four nodes of eight.
_RELEASED = Recipe(
    steps=100_000, batch=128, optimizer="adamw", lr=6e-5, warmup=0, schedule="constant", ema=(), ema_decay=0.9999
)
LATENT_RECIPES: dict[str, Recipe] = {
    **dict.fromkeys(UNETS, _RELEASED),
    "lvdm_tiny": Recipe(steps=6000, batch=16, optimizer="adamw", lr=2e-3, warmup=100),
}

LATENT_SAMPLING: dict[str, dict[str, Any]] = {
    # The released scripts take 50 steps of DDIM with eta 1.
    **{key: {"steps": 50, "solver": "ddpm", "spacing": "time"} for key in UNETS},
    "lvdm_tiny": {"steps": 32, "solver": "2m"},
}
"""How runs of a preset are sampled unless told otherwise; fields of :class:`hpdm.sampling.SamplerOptions`."""
