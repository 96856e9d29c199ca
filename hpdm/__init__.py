"""Hierarchical Patch Diffusion Models for video (CVPR 2024), on the fused kernels of :mod:`hpdm_kernels`."""

from hpdm import presets
from hpdm.patch.config import HPDMConfig
from hpdm.patch.model import HPDM

__version__ = "0.1.0"
__all__ = ["HPDM", "HPDMConfig", "presets"]
