"""Output of runs and evaluations: console, metrics.jsonl, pictures, plots and tables."""
