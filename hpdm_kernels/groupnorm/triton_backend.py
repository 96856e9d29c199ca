"""Launches the kernels."""
