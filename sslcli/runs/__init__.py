"""From a validated configuration to a run: directory, build, assemble, worker process, launch, evaluation, export."""
