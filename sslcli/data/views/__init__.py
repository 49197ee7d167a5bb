"""Augmentations: their configuration and the batched operations that carry them out."""
