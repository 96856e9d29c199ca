"""The table of all systems, one row each."""

from __future__ import annotations

from hpdm.latent.autoencoder_system import Autoencoding
from hpdm.latent.system import LatentVideoDiffusion
from hpdm.patch.system import PatchDiffusion
from hpdm.system import System

SYSTEMS: dict[str, System] = {
    system.name: system for system in (PatchDiffusion(), Autoencoding(), LatentVideoDiffusion())
}


def get(name: str) -> System:
    """The system of a run.

    Raises:
        ValueError: unknown name.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system: got {name!r}, expected one of {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def of_preset(preset: str) -> System:
    """The system that has a preset.

    Raises:
        ValueError: unknown preset.
    """
    for system in SYSTEMS.values():
        if preset in system.presets:
            return system
    names = [name for system in SYSTEMS.values() for name in system.presets]
    raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(names)}")
