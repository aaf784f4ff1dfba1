"""Attention heads on bags of cached embeddings."""
