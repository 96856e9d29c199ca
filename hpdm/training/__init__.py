"""From clips to weights: patches, noise, loss, optimizer, moving average, several processes, checkpoints."""
