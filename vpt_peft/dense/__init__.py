"""Models of our own for dense tasks: a plain ViT, which has no such model in transformers, with a small head."""
