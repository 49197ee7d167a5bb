"""Command-line entry points: composition with Hydra, help and messages; this package does not import torch."""
