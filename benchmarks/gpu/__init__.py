"""Correctness and speed on this machine's CUDA device: ``make gpu`` or ``python -m benchmarks.gpu``."""
