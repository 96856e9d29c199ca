"""Fused kernels of Hierarchical Patch Diffusion Models, each usable alone.

Every op takes ``backend="auto" | "reference" | "torch" | "triton"``; see :mod:`hpdm_kernels._backend`.
"""

from hpdm_kernels.attention.api import cross_attention, packed_attention, read_tokens
from hpdm_kernels.context.api import footprint_size, fuse_context, fuse_projected, project_sources, sample_context
from hpdm_kernels.groupnorm.api import group_norm_act
from hpdm_kernels.optimizer.api import LambNorms, adamw_step, lamb_step
from hpdm_kernels.patches.api import sample_patches
from hpdm_kernels.rows.api import bias_gelu, gated_residual, modulated_norm
from hpdm_kernels.temporal.api import temporal_attention
from hpdm_kernels.tiles.accumulator import TileAccumulator
from hpdm_kernels.tiles.api import average_tiles, extract_tiles

__all__ = [
    "LambNorms",
    "TileAccumulator",
    "adamw_step",
    "average_tiles",
    "bias_gelu",
    "cross_attention",
    "extract_tiles",
    "footprint_size",
    "fuse_context",
    "fuse_projected",
    "gated_residual",
    "group_norm_act",
    "lamb_step",
    "modulated_norm",
    "packed_attention",
    "project_sources",
    "read_tokens",
    "sample_context",
    "sample_patches",
    "temporal_attention",
]
