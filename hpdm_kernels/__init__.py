"""Fused kernels of Hierarchical Patch Diffusion Models, each usable alone.

Every op takes ``backend="auto" | "reference" | "torch" | "triton"``; see :mod:`hpdm_kernels._backend`.
"""

from hpdm_kernels.context import footprint_size, fuse_context, fuse_projected, project_sources, sample_context
from hpdm_kernels.cross_attention import cross_attention
from hpdm_kernels.patches import sample_patches
from hpdm_kernels.read_tokens import read_tokens
from hpdm_kernels.tiles import average_tiles, extract_tiles
from hpdm_kernels.tiles_accumulate import TileAccumulator

__all__ = [
    "TileAccumulator",
    "average_tiles",
    "cross_attention",
    "extract_tiles",
    "footprint_size",
    "fuse_context",
    "fuse_projected",
    "project_sources",
    "read_tokens",
    "sample_context",
    "sample_patches",
]
