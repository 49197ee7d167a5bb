"""Slurm: the batch script, and submission and monitoring of jobs."""
