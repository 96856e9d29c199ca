"""Cross-attention between latents and tokens (paper Fig. 11), and its fusion with the projection of the tokens."""
