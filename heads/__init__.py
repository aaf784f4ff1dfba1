"""Heads that learn on cached embeddings: models, training, evaluation, inspection."""
