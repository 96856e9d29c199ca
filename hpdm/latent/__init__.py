"""Latent video diffusion (LVDM, He et al. 2022): videos as grids of latents of an autoencoder."""
