"""Slurm: what a job is told (`script`) and how it is handed in and watched (`queue`). Imports no torch."""
