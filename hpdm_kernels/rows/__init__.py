"""What stands between the products of a network, each in one pass over its rows: norm, gated residual, GELU."""
