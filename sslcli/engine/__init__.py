"""The training loop and what it needs: monitor, collapse detection, checkpoints, FSDP, optimizers, precision."""
