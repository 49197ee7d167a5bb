"""Command-line entry points: composition with Hydra, help and messages. This package does not import torch."""
