"""What a run tells: metrics as JSON lines and TensorBoard scalars, progress for the terminal, pictures."""
