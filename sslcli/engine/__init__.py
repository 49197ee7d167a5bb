"""Training loop, monitor, collapse detection, checkpoints, FSDP, optimizers and mixed precision."""
