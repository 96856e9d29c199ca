"""Hierarchical patch diffusion (HPDM, CVPR 2024): a video as a pyramid of patches, trained and sampled by level."""
