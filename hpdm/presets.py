"""The presets by name: their configs and recipes."""

from hpdm.patch.presets import (
    PRESETS,
    PUBLISHED_PARAMETERS,
    RECIPES,
    Recipe,
    get,
    hpdm_l,
    hpdm_m,
    hpdm_s,
    hpdm_t2v,
    hpdm_t2v_1k,
    recipe,
    tiny,
)

__all__ = [
    "PRESETS",
    "PUBLISHED_PARAMETERS",
    "RECIPES",
    "Recipe",
    "get",
    "hpdm_l",
    "hpdm_m",
    "hpdm_s",
    "hpdm_t2v",
    "hpdm_t2v_1k",
    "recipe",
    "tiny",
]
