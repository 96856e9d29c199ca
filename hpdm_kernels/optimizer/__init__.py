"""One step of AdamW or LAMB, with clipping and moving averages, over all tensors of a model."""
