"""Measurements along long videos of the synthetic set: what stays, what drifts, what jumps where windows meet."""
