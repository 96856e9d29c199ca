"""Configs and recipes of the paper's Table 8, and of a tiny model that trains on two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpdm.patch.config import HPDMConfig
from hpdm.recipe import Recipe

PUBLISHED_PARAMETERS = {
    "hpdm_s": 178e6,
    "hpdm_m": 321e6,
    "hpdm_l": 725e6,
    "hpdm_t2v": 3934e6,
    "hpdm_t2v_1k": 3934e6,
}
"""Table 8, last but one row."""


def hpdm_s() -> HPDMConfig:
    """HPDM-S: UCF-101, 64x256x256 in patches of 16x64x64, latent width 256."""
    return HPDMConfig(latent_width=256)


def hpdm_m() -> HPDMConfig:
    """HPDM-M: as S with latent width 512."""
    return HPDMConfig(latent_width=512)


def hpdm_l() -> HPDMConfig:
    """HPDM-L: as S with latent width 1024."""
    return HPDMConfig(latent_width=1024)


def hpdm_t2v() -> HPDMConfig:
    """HPDM-T2V: text to video, 64x288x512 in patches of 8x36x64."""
    return HPDMConfig(
        patch=(8, 36, 64),
        levels=4,
        tokenizer=(1, 3, 4),
        latent_width=3072,
        levels_per_block=(1, 2, 2, 3, 3, 4),
        conditioning="text",
    )


def hpdm_t2v_1k() -> HPDMConfig:
    """HPDM-T2V-1K: text to video, 16x576x1024 in patches of 16x72x128."""
    return HPDMConfig(
        patch=(16, 72, 128),
        ratio=(1, 2, 2),
        levels=4,
        tokenizer=(1, 3, 4),
        latent_width=3072,
        levels_per_block=(4, 4, 4, 4, 4, 4),
        conditioning="text",
    )


def tiny() -> HPDMConfig:
    """A three-level model of 16x64x64 in patches of 4x16x16 that learns on two CPU cores."""
    return HPDMConfig(
        patch=(4, 16, 16),
        tokenizer=(1, 2, 2),
        width=64,
        latents=48,
        latent_width=96,
        head_width=16,
        latent_layers=1,
        latent_mlp_ratio=2,
        conditioning_width=96,
        classes=6,
    )


PRESETS: dict[str, Callable[[], HPDMConfig]] = {
    f.__name__: f for f in (hpdm_s, hpdm_m, hpdm_l, hpdm_t2v, hpdm_t2v_1k, tiny)
}


RECIPES: dict[str, Recipe] = {
    "hpdm_s": Recipe(),
    "hpdm_m": Recipe(),
    "hpdm_l": Recipe(steps=65_000),
    # After 500,000 steps of a base model at 36x64; the batch is as many images as videos.
    "hpdm_t2v": Recipe(steps=15_000, batch=8192, images=0.5, warmup=5000, parallel="fsdp"),
    "hpdm_t2v_1k": Recipe(steps=100_000, batch=2048, images=0.5, warmup=5000, parallel="fsdp"),
    "tiny": Recipe(steps=17_500, batch=16, optimizer="muon", lr=4e-3, warmup=200),
}

SAMPLING: dict[str, dict[str, Any]] = {
    "tiny": {"steps": 32, "guidance": 2.0, "later_guidance": 1.0, "consistency": 1.0, "known_noise": 0.0},
}
"""How runs of a preset are sampled unless told otherwise; fields of :class:`hpdm.sampling.SamplerOptions`."""
