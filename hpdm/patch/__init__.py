"""Hierarchical patch diffusion (HPDM, CVPR 2024): a video as a pyramid of patches, sampled level by level."""
