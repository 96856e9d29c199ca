"""Ahead-of-time compilation of every kernel for GPUs that need not be present."""
