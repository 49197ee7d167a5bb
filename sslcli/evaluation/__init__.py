"""Evaluation protocols (one file each), and their shared code: features, label subsets and training."""
