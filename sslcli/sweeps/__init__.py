"""Sweeps (`--multirun`): jobs, the local job queue, and the table of results."""
