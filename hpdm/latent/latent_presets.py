"""Presets of latent video diffusion: U-Nets with the autoencoders that they are for, how they are trained and sampled.

A preset's autoencoder has no weights: a run takes those of ``hpdm train --autoencoder``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hpdm.latent.latent_config import LatentConfig
from hpdm.latent.presets import lvdm_ae, lvdm_ae_tiny
from hpdm.latent.unet_presets import PUBLISHED_PARAMETERS, UNETS
from hpdm.recipe import Recipe

__all__ = ["LATENT_PRESETS", "LATENT_RECIPES", "LATENT_SAMPLING", "PUBLISHED_PARAMETERS"]


def _config(name: str) -> LatentConfig:
    released = name not in ("lvdm_ucf", "lvdm_tiny")
    autoencoder = lvdm_ae_tiny() if name == "lvdm_tiny" else lvdm_ae()
    return LatentConfig(UNETS[name](), autoencoder, loss="l1" if released else "l2")


LATENT_PRESETS: dict[str, Callable[[], LatentConfig]] = {name: partial(_config, name) for name in UNETS}

# The released configs have AdamW with a constant rate, no schedule, and an average with the decay 0.9999. Neither they
# nor the paper say how many steps; epochs and the size of UCF-101 give about 100,000. The batch of 128 is inferred: two
# clips on each GPU, twice per step, on four nodes of eight.
_RELEASED = Recipe(
    steps=100_000, batch=128, optimizer="adamw", lr=6e-5, warmup=0, schedule="constant", ema=(), ema_decay=0.9999
)
LATENT_RECIPES: dict[str, Recipe] = {
    **dict.fromkeys(UNETS, _RELEASED),
    "lvdm_tiny": Recipe(steps=8000, batch=16, optimizer="adamw", lr=2e-3, warmup=100),
}

LATENT_SAMPLING: dict[str, dict[str, Any]] = {
    # Three latents between two known ones; of the authors' scripts: DDIM, 50 steps.
    "lvdm_tiny": {"steps": 32, "solver": "2m", "known_noise": 0.1},
}
"""How runs of a preset are sampled unless told otherwise; fields of :class:`hpdm.sampling.SamplerOptions`."""
