"""Hierarchical Patch Diffusion Models for video (CVPR 2024), and latent ones, on the kernels of :mod:`hpdm_kernels`.

``import hpdm`` is cheap: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpdm import presets
    from hpdm.latent.autoencoder import VideoAutoencoder
    from hpdm.latent.latent_model import LVDM
    from hpdm.patch.boxes import sample_boxes
    from hpdm.patch.config import HPDMConfig
    from hpdm.patch.model import HPDM
    from hpdm.patch.sampler import Sampler
    from hpdm.runs import load
    from hpdm.sampling import SamplerOptions

__version__ = "0.1.0"
__all__ = [
    "HPDM",
    "LVDM",
    "HPDMConfig",
    "Sampler",
    "SamplerOptions",
    "VideoAutoencoder",
    "__version__",
    "load",
    "presets",
    "sample_boxes",
]

_MODULES = {
    "HPDM": "hpdm.patch.model",
    "HPDMConfig": "hpdm.patch.config",
    "LVDM": "hpdm.latent.latent_model",
    "Sampler": "hpdm.patch.sampler",
    "SamplerOptions": "hpdm.sampling",
    "VideoAutoencoder": "hpdm.latent.autoencoder",
    "load": "hpdm.runs",
    "sample_boxes": "hpdm.patch.boxes",
}


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module("hpdm.presets")
    if name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hpdm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
