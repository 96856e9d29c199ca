"""Attention of a RIN block (paper Fig. 11): cross-attention, and the read of tokens with its projection."""
