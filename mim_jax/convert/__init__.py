"""Weights of others, read safely and called by our names."""
