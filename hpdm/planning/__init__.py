"""The cost of a model, predicted before it runs: memory, work, the largest batch, the paper's Table 1."""
