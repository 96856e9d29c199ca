"""Sets of clips: folders and tar shards, decoding, batches in a reproducible order, and a synthetic set."""
