"""Operating-system functions: atomic writes, regular files, locks, memory, CPU cores, child processes."""
