"""Slurm support: batch script (`script`), submission and monitoring (`queue`). Does not import torch."""
