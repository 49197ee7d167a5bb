"""Weight files: reading without executing code, and loading that requires every key and shape to match."""
