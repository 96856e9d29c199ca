"""What a model costs before it runs: memory, work, the largest batch, the paper's Table 1."""
