"""Training, evaluation and export from a validated configuration."""
