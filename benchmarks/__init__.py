"""Benchmarks of the ops and of the model against the strongest peers: ``make bench`` or ``pytest benchmarks``."""
