"""The operating system: atomic and regular files, locks, memory, CPU cores, child processes."""
