"""Attention of the frames at each position to each other, with embeddings of their distances (LVDM section 3.2)."""
