"""The quality of a run: denoising error, FVD and Inception score, motion of the synthetic clips."""
