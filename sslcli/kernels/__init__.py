"""Compiled C kernels and their Python wrappers. Each kernel has a fallback that uses torch operations."""
