"""Captions: a frozen T5 encoder and a store of its embeddings."""
