"""How good a run is: denoising error, FVD and Inception score, motion of the synthetic clips."""
