"""Compiled C kernels and their Python wrappers; each has a fallback written with torch operations."""
