"""Group normalization with its modulation and activation, into a buffer with repeated edges: in few passes."""
