"""The presets of all systems, by name: config and training recipe."""

from __future__ import annotations

from typing import Any

from hpdm import systems
from hpdm.latent.latent_presets import lvdm_interpolate, lvdm_predict, lvdm_released, lvdm_tiny, lvdm_ucf
from hpdm.latent.presets import lvdm_ae, lvdm_ae_tiny
from hpdm.patch.presets import hpdm_l, hpdm_m, hpdm_s, hpdm_t2v, hpdm_t2v_1k, tiny
from hpdm.recipe import Recipe

__all__ = [
    "get", "hpdm_l", "hpdm_m", "hpdm_s", "hpdm_t2v", "hpdm_t2v_1k", "lvdm_ae", "lvdm_ae_tiny", "lvdm_interpolate",
    "lvdm_predict", "lvdm_released", "lvdm_tiny", "lvdm_ucf", "published_parameters", "recipe", "tiny",
]  # fmt: skip


def get(name: str) -> Any:
    """The config of a preset.

    Raises:
        ValueError: unknown name.
    """
    return systems.of_preset(name).presets[name]()


def recipe(name: str) -> Recipe:
    """How a preset is trained.

    Raises:
        ValueError: unknown name.
    """
    return systems.of_preset(name).recipes[name]


def published_parameters(name: str) -> float | None:
    """The published number of parameters of a preset; ``None`` if no number was published.

    Raises:
        ValueError: unknown name.
    """
    return systems.of_preset(name).published_parameters.get(name)
