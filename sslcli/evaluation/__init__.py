"""Evaluation protocols, one per file, and the code that they share: features, label subsets, training."""
