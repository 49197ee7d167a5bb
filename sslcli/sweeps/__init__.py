"""Sweeps (`--multirun`): jobs, the job queue of this machine, and the table of results."""
