"""Training heads."""
