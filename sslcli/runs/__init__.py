"""Training, evaluation and export from a validated configuration: directory, build, launch, worker process, results."""
