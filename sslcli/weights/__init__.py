"""Weight files: reading without executing code, and strict loading. All keys and shapes must match."""
