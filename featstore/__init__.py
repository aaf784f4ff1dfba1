"""PNG patches to frozen embeddings, embeddings to bags."""
